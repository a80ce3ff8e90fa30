"""Export the backbone of a config, with a checkpoint's weights, to ONNX, and check that onnxruntime agrees with torch.

Batch, height and width stay free. The file is written only if the two agree at sizes other than the traced one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from command_line import exit_on, read_config

import torch
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ce.checkpoints import CheckpointFileError, whole_file
from mmdet_ce.checkpoints.trained_backbone import load_backbone
from mmdet_ce.compat import FEATURES, TORCH

if TORCH < FEATURES['torch.export and export to ONNX']:
    sys.exit(f'error: export needs torch 2.6 or later, this is torch {torch.__version__}')
try:
    import onnx
    import onnx_ir.passes.common as onnx_passes
    import onnxruntime
    import onnxscript  # noqa: F401 - torch.onnx needs it
except ImportError as missing:
    sys.exit(f'error: {missing.name} is not installed, and export needs it: pip install "mmdet_ce[deploy]"')

TRACED = (2, 3, 224, 320)
CHECKED = [(1, 3, 320, 480), (3, 3, 203, 171)]
TOLERANCE = 1e-4  # of the largest magnitude of an output


def export(backbone: nn.Module) -> bytes:
    """Return a backbone in evaluation as an ONNX model: ``images`` (N, 3, H, W) to ``level0``, ...; N, H and W free."""
    # It warns of operators of torchvision, if that is not installed, which no backbone has, and of its own old names.
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        program = torch.onnx.export(
            backbone,
            (torch.zeros(TRACED),),
            dynamo=True,
            verbose=False,
            input_names=['images'],
            dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},),
        )
    for index, level in enumerate(program.model.graph.outputs):
        level.name = f'level{index}'
    onnx_passes.ClearMetadataAndDocStringPass()(program.model)  # it names files of this machine
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def session(model: bytes) -> onnxruntime.InferenceSession:
    """Load an ONNX model for the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Between two runs its threads would wait at full load, and slow down what else is timed.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])


@torch.no_grad()
def largest_difference(backbone: nn.Module, model: onnxruntime.InferenceSession, shape: tuple[int, ...]) -> float:
    """Return the largest difference of any level on random images, as a part of the level's largest magnitude.

    NaN if there is one anywhere.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    levels = model.run(None, {'images': images.numpy()})
    pairs = zip(map(torch.from_numpy, levels), backbone(images))
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def export_checked(backbone: nn.Module, out: Path) -> None:
    """Export, compare at both sizes, and write ``out``, whole or not at all.

    Raises:
        ValueError: If onnxruntime computes something else than torch.
    """
    model = export(backbone)
    runtime = session(model)
    for shape in CHECKED:
        difference = largest_difference(backbone, runtime, shape)
        size = 'x'.join(map(str, shape))
        if not difference <= TOLERANCE:  # NaN neither
            raise ValueError(f'onnxruntime and torch differ by {difference:.2g} at {size}; nothing was written')
        print(f'{size}: onnxruntime and torch differ by {difference:.1g} of the largest magnitude')
    with whole_file(out) as file:
        file.write(model)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=Path, help='the config of the training')
    parser.add_argument('checkpoint', type=Path, help='what the training wrote, like epoch_12.pth')
    parser.add_argument('out', type=Path, help='the ONNX file to write')
    args = parser.parse_args()
    cfg = read_config(args.config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        with exit_on(CheckpointFileError, ValueError):
            backbone = load_backbone(cfg, args.checkpoint)
            print(f'exporting {type(backbone).__name__}', flush=True)
            export_checked(backbone, args.out)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        sys.exit(f'error: torch cannot export this backbone ({type(cause).__name__}: {str(cause).splitlines()[0]})')
    except OSError as error:
        sys.exit(f'error: {args.out} could not be written ({error.strerror})')
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
