"""The kernels compile ahead of time for GPUs of two generations, within their limits. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from utils import needs

pytestmark = [
    pytest.mark.kernels,
    needs('the Triton form on a GPU'),
    pytest.mark.skipif(
        not importlib.util.find_spec('triton') or os.environ.get('TRITON_INTERPRET') == '1',
        reason='needs Triton, and not its interpreter: make test-kernels',
    ),
]
# of a program: sm_80 stands for sm_86 and sm_89, which compile alike and have less than it
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
# Newton's iteration on the stem's 64 x 64 matrices, one program in the network, does not fit into the registers
SPILT = {16: 64, 64: 4096}
MAPS = ('x', 'out', 'residual', 'grad', 'relu_out', 'dy', 'dx')
NUMBERS = ('num_samples', 'num_groups', 'num_channels', 'num_hidden', 'num_parts', 'length', 'stretch')


def compile_kernel(
    kernel, map_type: str, constants: dict, num_warps: int, capability: int, ones: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Compile a kernel; return the bytes of shared memory and of registers that were spilt.

    Numbers named in ``ones`` are constants to the compiler, as Triton makes them of an argument that is 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    signature, values, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[(index,)] = 'constexpr', constants[name]
        elif name in ones:
            signature[name], values[(index,)] = 'constexpr', 1
        elif name in NUMBERS:
            signature[name] = 'i32'
        elif name in ('eps', 'norm_eps'):
            signature[name] = 'fp32'
        else:
            signature[name] = f'*{map_type}' if name in MAPS else '*fp32'
            hints[(index,)] = [['tt.divisibility', 16]]
    compiled = triton_compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget('cuda', capability, 32),
        options=dict(num_warps=num_warps),
    )
    ptxas = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'ptxas'
    architecture = re.search(r'\.target (\w+)', compiled.asm['ptx'])[1]
    command = [ptxas, '-v', f'-arch={architecture}', '-o', os.devnull, '/dev/stdin']
    report = subprocess.run(command, input=compiled.asm['ptx'], capture_output=True, text=True, check=True).stderr
    return compiled.metadata.shared, int(re.search(r'(\d+) bytes spill stores', report)[1])


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('map_type', ['bf16', 'fp32'])
@pytest.mark.parametrize('d', [16, 64])
@pytest.mark.parametrize('name', ['reduce', 'variance', 'apply', 'reduce_backward', 'apply_backward'])
def test_passes_over_a_map(name, d, map_type, capability):
    from mmdet_ce.ops import triton_map_kernels, triton_maps

    tiling = triton_maps.tiling_of(name, d, torch.float32 if map_type == 'fp32' else torch.bfloat16)
    constants = dict(
        d=d, block=tiling.block, channels_last=False, align=8, precision='tf32x3' if map_type == 'fp32' else 'tf32',
        with_covariance=name == 'reduce', has_constant=True, has_residual=True, relu=True, full=True,
    )  # fmt: skip
    kernel = getattr(triton_map_kernels, f'{"reduce" if name == "variance" else name}_kernel')
    shared, spilt = compile_kernel(kernel, map_type, constants, tiling.num_warps, capability)
    assert shared <= SHARED_MEMORY[80] and spilt <= 512, (shared, spilt)


@pytest.mark.parametrize(
    'name', ['reduce', 'merge_moments', 'apply', 'reduce_backward', 'merge_sums', 'apply_backward']
)
def test_a_single_position_compiles(name):
    from mmdet_ce.ops import triton_map_kernels

    constants = dict(
        d=16, block=64, channels_last=False, align=1, precision='tf32', with_covariance=True, has_constant=True,
        has_residual=True, relu=True, full=True, rows=16, parts=16,
    )  # fmt: skip
    kernel = getattr(triton_map_kernels, f'{name}_kernel')
    compile_kernel(kernel, 'bf16', constants, 4, 90, ones=('num_groups', 'length', 'stretch'))


@pytest.mark.parametrize('ones', [(), ('num_samples', 'num_groups', 'length')], ids=['many', 'single'])
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize(('d', 'num_hidden'), [(16, 256), (64, 16)])  # stage 3 and the stem
@pytest.mark.parametrize('name', ['batch', 'hidden', 'mixture', 'mixture_backward', 'hidden_backward', 'gate_backward'])
def test_small_matrices(name, d, num_hidden, capability, ones):
    from mmdet_ce.ops import triton_coefficient_backward_kernels, triton_coefficient_kernels, triton_coefficients

    constants = dict(
        d=d, num_iterations=3, training=True, has_norm=True, has_weight=True, has_alpha=True, max_groups=64,
        units=triton_coefficients.UNITS, max_hidden=num_hidden,
        block=triton_coefficients._hidden_block(num_hidden, d) if name in ('mixture', 'gate_backward') else 512,
    )  # fmt: skip
    module = triton_coefficient_backward_kernels if 'backward' in name else triton_coefficient_kernels
    num_warps = triton_coefficients.MATRIX_WARPS[d] if name in ('batch', 'mixture_backward') else 4
    shared, spilt = compile_kernel(getattr(module, f'{name}_kernel'), 'fp32', constants, num_warps, capability, ones)
    assert shared <= SHARED_MEMORY[capability] and spilt <= SPILT[d], (shared, spilt)
