"""The kernels compile ahead of time for GPUs of two generations, within their limits. No GPU is needed."""

from __future__ import annotations

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
    pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='the interpreter compiles nothing'),
]
triton = pytest.importorskip('triton', reason='needs Triton: make test-kernels')
# of a program: sm_80 stands for sm_86 and sm_89, which compile alike and have less than it
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
# Newton's iteration on the stem's 64 x 64 matrices, one program in the network, does not fit into the registers
SPILT = {16: 64, 64: 4096}
MAPS = ('x', 'out', 'shortcut', 'grad', 'relu_out', 'dy', 'dx')
NUMBERS = ('length', 'units', 'stretch', 'part_size')


def compile_kernel(kernel, map_type: str, constants: dict, num_warps: int, capability: int, ones: tuple[str, ...] = ()):
    """Compile a kernel; return the bytes of shared memory, those of registers that were spilt, and the PTX.

    Numbers named in ``ones`` are constants to the compiler, as Triton makes them of an argument that is 1.
    """
    signature, values, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in ones:
            signature[name], values[(index,)] = 'constexpr', constants[name] if parameter.is_constexpr else 1
        elif name in NUMBERS or name.startswith('num_'):
            signature[name] = 'i32'
        elif name in ('eps', 'norm_eps'):
            signature[name] = 'fp32'
        else:
            signature[name] = f'*{map_type}' if name in MAPS else '*fp32'
        if signature[name].startswith('*') or (name == 'stretch' and name not in ones):
            hints[(index,)] = [['tt.divisibility', 16]]
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, values, hints),
        target=triton.backends.compiler.GPUTarget('cuda', capability, 32),
        options=dict(num_warps=num_warps),
    )
    ptx = compiled.asm['ptx']
    ptxas = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'ptxas'
    command = [ptxas, '-v', f'-arch={re.search(r"[.]target (sm_[0-9a-z]+)", ptx)[1]}', '-o', os.devnull, '/dev/stdin']
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return compiled.metadata.shared, int(re.search(r'(\d+) bytes spill stores', report)[1]), ptx


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('map_type', ['bf16', 'fp32'])
@pytest.mark.parametrize('d', [16, 32, 64])
@pytest.mark.parametrize('name', ['reduce', 'variance', 'apply', 'reduce_backward', 'apply_backward'])
def test_passes_over_a_map(name, d, map_type, capability):
    """In both memory formats. Where 8 divides L, as in stage 3 at 800 x 1333, rows are not moved one by one either."""
    from mmdet_ce.ops import triton_map_kernels, triton_maps

    tiling = triton_maps.tiling_of(name, d, torch.float32 if map_type == 'fp32' else torch.bfloat16)
    constants = dict(
        d=d, block=tiling.block, align=8, precision='tf32x3' if map_type == 'fp32' else 'tf32',
        with_covariance=name == 'reduce', has_constant=True, has_shortcut=True, relu=True, full=True,
    )  # fmt: skip
    kernel = getattr(triton_map_kernels, f'{"reduce" if name == "variance" else name}_kernel')
    for channels_last in (False, True):
        constants['channels_last'] = channels_last
        shared, spilt, ptx = compile_kernel(kernel, map_type, constants, tiling.num_warps, capability)
        assert shared <= SHARED_MEMORY[80] and spilt <= 64, (channels_last, shared, spilt)
        assert not re.search(r'(ld|st)[.]global[.]b16', ptx)


@pytest.mark.parametrize('name', ['reduce', 'merge_moments', 'apply', 'reduce_backward', 'apply_backward'])
def test_a_single_position_compiles(name):
    from mmdet_ce.ops import triton_map_kernels

    constants = dict(
        d=16, block=64, channels_last=False, align=1, precision='tf32', with_covariance=True, has_constant=True,
        has_shortcut=True, relu=True, full=True, rows=16, parts=16,
    )  # fmt: skip
    kernel = getattr(triton_map_kernels, f'{name}_kernel')
    compile_kernel(kernel, 'bf16', constants, 4, 90, ones=('num_groups', 'length', 'units', 'stretch'))


@pytest.mark.parametrize('ones', [(), ('num_samples', 'num_groups', 'length')], ids=['many', 'single'])
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize(('d', 'num_hidden'), [(16, 256), (64, 16)])  # stage 3 and the stem
@pytest.mark.parametrize('name', ['batch', 'hidden', 'mixture', 'mixture_backward', 'hidden_backward', 'gate_backward'])
def test_small_matrices(name, d, num_hidden, capability, ones):
    from mmdet_ce.ops import triton_coefficient_backward_kernels, triton_coefficient_kernels, triton_coefficients

    max_groups, max_hidden, block = triton_coefficients._hidden_blocks(64, d, num_hidden)
    constants = dict(
        d=d, num_iterations=3, training=True, has_norm=True, has_alpha=True, max_groups=max_groups,
        units=triton_coefficients.UNITS, max_hidden=max_hidden,
        block=block if name in ('mixture', 'gate_backward') else triton_coefficients.BLOCK,
    )  # fmt: skip
    module = triton_coefficient_backward_kernels if 'backward' in name else triton_coefficient_kernels
    num_warps = triton_coefficients.MATRIX_WARPS[d] if name in ('batch', 'mixture_backward') else 4
    shared, spilt, _ = compile_kernel(getattr(module, f'{name}_kernel'), 'fp32', constants, num_warps, capability, ones)
    assert shared <= SHARED_MEMORY[capability] and spilt <= SPILT[d], (shared, spilt)
