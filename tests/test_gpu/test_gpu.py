"""What only a GPU can show; `make gpu` runs it with MMDET_CE_KERNELS=torch and =triton."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from released import assert_network_agrees, network_state
from torch import nn
from utils import assert_agree, randomize, reference

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.checkpoints.official import convert_official_state_dict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.mark.parametrize('training', [True, False])
def test_golden_network(training, monkeypatch):
    """The released ResNet-50."""
    backbone = CEResNet(depth=50, frozen_stages=-1, norm_eval=False)
    backbone.load_state_dict(convert_official_state_dict(network_state()))
    backbone.cuda().train(training)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    assert_network_agrees(backbone, 'cuda', tolerance=2e-4, train_c5=1e-3)


# Of the largest magnitude: of parameters' gradients and statistics, and of maps. In torch form matrices of 16 bits
# multiply maps of 16 bits.
TOLERANCES = {torch.float32: (5e-5, 2e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3)}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('tf32', [True, False])
def test_a_layer_agrees_with_float64(dtype, training, folded, memory_format, tf32, monkeypatch):
    """Output, all gradients and running values; TF32 may reach the products over the map and nothing else."""
    norm, ce = randomize(nn.BatchNorm2d(64)).eval(), randomize(ChannelEquilibrium(64), seed=1).train(training)
    x, grad = torch.randn(2, 64, 17, 20) + 3 * torch.randn(1, 64, 1, 1), torch.randn(2, 64, 17, 20)
    x, grad = (t.to(dtype).to(memory_format=memory_format) for t in (x, grad))
    norm64, ce64, x64 = copy.deepcopy(norm).double(), copy.deepcopy(ce).double(), x.double().requires_grad_()
    expected = reference(ce64, norm64(x64) if folded else x64)
    expected.out.backward(grad.double())
    norm, ce, x = norm.cuda(), ce.cuda(), x.cuda().requires_grad_()
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', tf32)
    out = ce(x, norm if folded else None)
    out.backward(grad.cuda())
    small, large = (max(tolerance, 2e-3 * tf32) for tolerance in TOLERANCES[dtype])
    assert_agree(out.detach().cpu(), expected.out.detach(), large, 'out')
    assert_agree(x.grad.cpu(), x64.grad, large, 'x')
    for (name, parameter), exact in zip(ce.named_parameters(), ce64.parameters()):
        assert_agree(parameter.grad.cpu(), exact.grad, small, name)
    if training:
        ce64._update(expected.mean.detach(), expected.whitening.detach(), expected.scale.detach())
        tolerance = max(1e-4, TOLERANCES[dtype][0])  # not TF32's: the small matrices are exact
        for (name, buffer), exact in zip(ce.named_buffers(), ce64.buffers()):
            assert_agree(buffer.cpu(), exact, tolerance, name)


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


def test_a_layer_keeps_little_more_than_its_input_and_output():
    norm, ce = nn.BatchNorm2d(256).eval().cuda(), ChannelEquilibrium(256).cuda()
    x, shortcut = (torch.randn(2, 256, 100, 100, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    size = x.numel() * x.element_size()
    ce(x.requires_grad_(), norm, shortcut, relu=True).sum().backward()  # the check at first use
    before = torch.cuda.memory_allocated()
    out = ce(x, norm, shortcut, relu=True)
    kept = (torch.cuda.memory_allocated() - before) / size
    torch.cuda.reset_peak_memory_stats()
    out.sum().backward()
    peak = (torch.cuda.max_memory_allocated() - before) / size
    assert kept <= 1.1 and peak <= (5 if os.environ.get('MMDET_CE_KERNELS') == 'triton' else 9), (kept, peak)
