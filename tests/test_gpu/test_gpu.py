"""What only a GPU can show (`make gpu`)."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import pytest
import torch
from mmdet.models import ResNet
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from utils import assert_agree, randomize, reference

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.checkpoints.official import convert_official_state_dict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.mark.parametrize('training', [True, False])
def test_golden_network(golden, fill, training, monkeypatch):
    """The released ResNet-50; in training float32 rounding of the input alone moves the last stage by 2e-4."""
    shapes = json.loads((golden / 'official_resnetv1ce50_keys.json').read_text())
    official = {name: torch.from_numpy(np.asarray(fill(name, shape))) for name, shape in shapes.items()}
    backbone = CEResNet(depth=50, frozen_stages=-1, norm_eval=False)
    backbone.load_state_dict(convert_official_state_dict(official))
    backbone.cuda().train(training)
    values = np.load(golden / f'ce_resnet50_{"train" if training else "eval"}.npz')
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    outs = backbone(torch.as_tensor(values['x']).cuda())
    for name, out in zip(('c2', 'c3', 'c4', 'c5'), outs):
        assert_agree(out.detach().cpu(), values[name], 1e-3 if training and name == 'c5' else 2e-4, name)


def test_tf32_reaches_the_products_over_the_map_alone(monkeypatch):
    """It moves the output by what a product in TF32 does; the small matrices, and so the running values, are exact."""
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', True)
    ce = randomize(ChannelEquilibrium(64))
    exact = copy.deepcopy(ce).double()
    x = torch.randn(2, 64, 17, 20) + 3 * torch.randn(1, 64, 1, 1)
    expected = reference(exact, x.double()).out
    assert_agree(ce.cuda()(x.cuda()).detach().cpu(), expected.detach(), 2e-3, 'out')
    exact(x.double())
    for (name, buffer), other in zip(ce.named_buffers(), exact.buffers()):
        assert_agree(buffer.cpu(), other, 1e-4, name)


def stage(norm_eval: bool = True) -> CEResNet:
    """Return the stem and the first stage of ResNet-50: with maps of 56x56 some ends of blocks are long enough."""
    one = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    return randomize(CEResNet(depth=50, frozen_stages=-1, norm_eval=norm_eval, **one)).train()


def step(backbone, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Run forward and backward of a step and return the output."""
    with torch.autocast('cuda', dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        (out,) = backbone(x)
    out.double().square().mean().backward()
    return out.detach()


def gradients(backbone) -> torch.Tensor:
    """Return all gradients as one vector: those of small ones hold little more than rounding."""
    return torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()])


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 3e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_stage_agrees_with_float64(dtype, tolerance, norm_eval, memory_format, monkeypatch):
    """Norms, convolutions, shortcuts and CE together: output, all gradients and running values."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    backbone = stage(norm_eval)
    exact = copy.deepcopy(backbone).double()
    backbone.cuda().to(memory_format=memory_format)
    x = torch.randn(2, 3, 224, 224)
    expected = step(exact, x.double(), torch.float64)
    assert_agree(step(backbone, x.cuda().to(memory_format=memory_format), dtype).cpu(), expected, tolerance, 'out')
    assert_agree(gradients(backbone).cpu(), gradients(exact), tolerance, 'gradients')
    for (name, buffer), other in zip(backbone.named_buffers(), exact.buffers()):
        assert_agree(buffer.cpu(), other, tolerance, name)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_amp_trains_as_float32_does(dtype):
    """20 steps on one batch end near the loss of float32."""
    images, target = torch.randn(4, 3, 128, 128, device='cuda'), torch.randn(4, 256, 4, 4, device='cuda')
    losses = []
    for wrap in (functools.partial(AmpOptimWrapper, dtype=dtype), OptimWrapper):
        torch.manual_seed(0)
        model = CEResNet(18, base_channels=32, frozen_stages=-1, norm_eval=False).cuda().train()
        wrapper = wrap(optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
        for _ in range(20):
            with wrapper.optim_context(model):
                loss = (model(images)[-1].float() - target).square().mean()
            wrapper.update_params(loss)
        losses.append(loss.item())
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_step_keeps_little_more_than_the_plain_network():
    """In bfloat16: what is kept between forward and backward, and the peak."""
    x = torch.randn(2, 3, 320, 480, device='cuda')
    kept, peak = [], []
    for backbone in (ResNet(50), CEResNet(50)):
        backbone.cuda().train()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast('cuda', torch.bfloat16):
            out = backbone(x)[-1]
        kept.append(torch.cuda.memory_allocated() - before)
        out.sum().backward()
        peak.append(torch.cuda.max_memory_allocated() - before)
        del out
    assert kept[1] <= 1.1 * kept[0] and peak[1] <= 1.2 * peak[0], (kept, peak)


def test_cuda_graph_of_inference():
    backbone = stage().eval().cuda()
    x, other = torch.randn(2, 2, 3, 224, 224, device='cuda')
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            backbone(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (out,) = backbone(x)
        x.copy_(other)
        graph.replay()
        assert_agree(out.cpu(), backbone(other)[0].cpu(), 1e-5)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_compiled_step(norm_eval):
    backbone = stage(norm_eval).cuda()
    other = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 224, 224, device='cuda')
    assert_agree(step(torch.compile(other), x), step(backbone, x), 2e-3, 'out')
    assert_agree(gradients(other), gradients(backbone), 2e-2, 'gradients')
