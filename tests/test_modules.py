import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from modules import VQVAE2, ToPixels, VectorQuantiser, VQVAE2Config

SMALL = VQVAE2Config(K=16, D=8, channels=16, top_channels=24, residual_channels=8, decoder_blocks=1)


def small_model(seed: int = 0) -> VQVAE2:
    """A model whose codebooks have started from a batch."""
    torch.manual_seed(seed)
    model = VQVAE2(SMALL)
    model(torch.randn(4, 1, 32, 16))
    return model.eval()


def quantiser(K: int = 8, D: int = 4, **kwargs) -> VectorQuantiser:
    torch.manual_seed(0)
    built = VectorQuantiser(K, D, **kwargs)
    built(torch.randn(2, D, 8, 8))
    return built


# ---- the network ----


def test_decoding_the_codes_is_the_forward_pass():
    model, x = small_model(), torch.randn(3, 1, 48, 24)
    with torch.inference_mode():
        decoded = model.decode_codes(*model.encode(x))
        torch.testing.assert_close(decoded, model(x).reconstruction, rtol=0, atol=1e-5)


def test_codes_of_a_slice_do_not_depend_on_its_batch():
    model, x = small_model(), torch.randn(5, 1, 32, 16)
    with torch.inference_mode():
        together, alone = model.encode(x), model.encode(x[2:3])
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone, strict=True))


def test_it_is_a_hierarchy():
    """Bottom codes see the top ones, both reach the picture; the top sees no bottom code."""
    model, x = small_model(), torch.randn(1, 1, 32, 16)
    with torch.inference_mode():
        top, bottom = model.encode(x)
        picture = model.decode_codes(top, bottom)
        assert not torch.equal(picture, model.decode_codes((top + 1) % 16, bottom))
        assert not torch.equal(picture, model.decode_codes(top, (bottom + 1) % 16))
        model.quantiser_top.codebook.mul_(-3)  # other top vectors: other bottom codes
        assert not torch.equal(bottom, model.encode(x)[1])


@pytest.mark.parametrize(
    "size, fix",
    [((256, 129), (256, 136)), ((250, 128), (256, 128)), ((4, 8), (8, 8)), ((0, 8), (0, 8))],
)
def test_sizes_that_do_not_divide_are_refused(size, fix):
    said = "multiples of 8, .* Fix: --height {} --width {}$".format(*fix)
    with pytest.raises(ValueError, match=said):
        VQVAE2Config().code_shapes(*size)
    if min(size) >= 4:
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
            small_model()(torch.randn(1, 1, *size))


@pytest.mark.parametrize("shape", [(2, 64, 32), (1, 3, 64, 32)])
def test_slices_have_one_channel(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 1, height, width\)"):
        small_model().encode(torch.zeros(shape))


def test_every_parameter_learns():
    torch.manual_seed(0)
    model, x = VQVAE2(replace(SMALL, labels=3)), torch.randn(4, 1, 32, 16)
    output = model(x)
    commitment = output.top.commitment + output.bottom.commitment
    of_masks = output.mask_logits.square().mean() + output.coarse_mask_logits.square().mean()
    (F.mse_loss(output.reconstruction, x) + 0.25 * commitment + of_masks).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_code_maps_that_do_not_belong_together_are_refused():
    codes, model = torch.zeros(1, 4, 2, dtype=torch.int64), small_model()
    for wrong in ((1, 4, 4), (1, 8, 2), (2, 8, 4)):
        said = rf"of {re.escape(f'(1, 4, 2) and {wrong}')}; expected \(B, h, w\) and \(B, 2h, 2w\)"
        with pytest.raises(ValueError, match=said):
            model.decode_codes(codes, codes.new_zeros(wrong))


# ---- the quantiser ----


def test_nearest_code_is_the_brute_force_one():
    vq = quantiser(K=37, D=5)
    vq.chunk = 7  # that does not divide the rows
    flat = torch.randn(100, 5)
    distances = (flat.double()[:, None] - vq.codebook.double()[None]).square().sum(2)
    assert torch.equal(vq.nearest(flat), distances.argmin(1))


@pytest.mark.parametrize("price_rise, updates, paid", [(0, 0, 1), (9, 4, 0.5), (9, 50, 1)])
def test_the_bit_weight_weighs_bits_against_distance(price_rise, updates, paid):
    quantiser = VectorQuantiser(12, 4, bit_weight=0.02, price_rise=price_rise).eval()
    quantiser.updates.fill_(updates)
    quantiser.ema_count.copy_(torch.arange(1.0, 13))
    z, e = torch.randn(500, 4).double(), quantiser.codebook.double()
    p = torch.arange(1.0, 13, dtype=torch.float64) / 78
    centre = sum(p[k] * e[k] for k in range(12))
    variance = sum(p[k] * ((e[k] - centre) ** 2).sum() for k in range(12))
    bit = 0.02 * paid * variance
    costs = [((z - e[k]) ** 2).sum(1) - bit * torch.log2(p[k]) for k in range(12)]
    codes = torch.stack(costs, 1).argmin(1)
    assert torch.equal(quantiser.nearest(z.float()), codes)
    price = quantiser(z.float().mT.view(1, 4, 20, 25)).price.flatten()
    torch.testing.assert_close(price.double(), -0.02 * torch.log2(p[codes]), rtol=1e-6, atol=0)
    assert not VectorQuantiser(12, 4).train()(torch.randn(2, 4, 8, 8)).price.any()


def test_no_matrix_of_all_rows_by_all_codes_is_held(monkeypatch):
    vq = quantiser(K=8, D=4)
    held = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: held.append(addmm(*a, **k)) or held[-1])
    vq.nearest(torch.randn(3 * vq.chunk + 1, 4))
    assert max(len(matrix) for matrix in held) == vq.chunk


def test_pixels_are_a_transposed_convolution_s():
    layer = ToPixels(6, 4)
    reference = torch.nn.ConvTranspose2d(6, 1, 8, stride=4, padding=2)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6, 5, 4)
    torch.testing.assert_close(layer(x), reference(x))


def test_the_mask_head_sees_the_width_of_a_slice_and_leaves_the_picture_alone():
    model = VQVAE2(VQVAE2Config(labels=3)).eval()
    x = torch.randn(1, 1, 256, 128)
    output = model(x)
    assert output.mask_logits.shape == (1, 3, 256, 128)
    vectors = torch.randn(1, 128, 64, 32, requires_grad=True)
    model.mask_head(vectors)[0, 1, 128, 2].backward()
    seen = vectors.grad[0].abs().sum(0) > 0
    assert seen[32].all() and seen[8:56].any(1).all()
    vectors.grad = None  # a place tells of itself even where all around it says nothing
    torch.nn.init.zeros_(model.mask_head.wide[-1].weight)
    model.mask_head(vectors)[0, 1, 128, 2].backward()
    assert vectors.grad[0, :, 32, 0].any()
    with torch.no_grad():
        for parameter in model.mask_head.parameters():
            parameter.normal_()
    other = model(x)
    assert other.reconstruction.equal(output.reconstruction)
    assert not other.mask_logits.equal(output.mask_logits)


def test_quantised_vectors_are_codes_and_the_gradient_goes_straight_through():
    vq = quantiser()
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    codebook = vq.codebook.clone()
    out = vq(z)
    torch.testing.assert_close(out.vectors, F.embedding(out.codes, codebook).permute(0, 3, 1, 2))
    gradient = torch.randn_like(z)
    out.vectors.backward(gradient)
    assert torch.equal(z.grad, gradient)


def test_commitment_pulls_the_encoder_alone():
    """sum ||z - sg[e]||^2 / n: its gradient is 2 (z - e) / n, and the codebook is no parameter."""
    vq = quantiser().eval()
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = vq(z)
    out.commitment.backward()
    torch.testing.assert_close(z.grad, 2 * (z - out.vectors).detach() / z.numel())
    assert out.commitment.item() == pytest.approx((z - out.vectors).square().mean().item())
    assert not list(vq.parameters())


def test_ema_follows_appendix_a1():
    decay = 0.9
    vq = quantiser(K=4, D=3, decay=decay, revive=0.0)
    vq.updates.fill_(10**6)  # past the warm-up of gamma
    N, m = vq.ema_count.double().clone(), vq.ema_sum.double().clone()
    z = torch.randn(5, 3, 6, 6)
    codes = vq(z).codes.flatten()
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3).double()
    for k in range(4):
        N[k] = decay * N[k] + (1 - decay) * (codes == k).sum()
        m[k] = decay * m[k] + (1 - decay) * flat[codes == k].sum(0)
    smoothed = (N + vq.epsilon) / (N.sum() + 4 * vq.epsilon) * N.sum()
    torch.testing.assert_close(vq.ema_count.double(), N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vq.codebook.double(), m / smoothed[:, None], rtol=1e-5, atol=1e-5)


def test_codebook_starts_from_the_first_batch():
    torch.manual_seed(0)
    vq = VectorQuantiser(8, 4, revive=0.0)
    z = torch.randn(2, 4, 8, 8) + 100
    vq.start(z.permute(0, 2, 3, 1).reshape(-1, 4))
    flat = {tuple(v) for v in z.permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
    assert {tuple(v) for v in vq.codebook.tolist()} <= flat
    other = VectorQuantiser(8, 4)
    other(z)
    assert other.codebook.mean() > 90 and other.updates == 1


def test_a_dead_code_restarts_with_its_averages():
    vq = quantiser(K=8, D=4, revive=0.1)
    vq.codebook[3] = 1e3  # nobody is near
    vq.ema_sum[3] = 1e3
    vq.ema_count[3] = 1e-6
    z = torch.randn(2, 4, 8, 8)
    vq(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    assert (flat - vq.codebook[3]).abs().amax(1).min() < 1e-3
    mean = vq.ema_count.sum() / 8
    assert vq.ema_count[3] == pytest.approx(mean.item(), rel=0.2)
    average = vq.ema_sum[3] / vq.ema_count[3]
    torch.testing.assert_close(average, vq.codebook[3], rtol=1e-3, atol=1e-3)
    vq(torch.randn(2, 4, 8, 8))
    assert vq.codebook[3].abs().max() < 10  # with the old averages it would be back at 1,000


def test_a_loaded_codebook_does_not_start_again():
    vq, loaded = quantiser(), VectorQuantiser(8, 4)
    loaded.load_state_dict(vq.state_dict())
    for each in (vq, loaded):
        torch.manual_seed(1)
        each(torch.full((2, 4, 8, 8), 50.0))
    assert torch.equal(vq.codebook, loaded.codebook)


def test_eval_changes_no_buffer():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 1, 32, 16))
    fresh = VQVAE2(SMALL).eval()
    codebook = fresh.quantiser_top.codebook.clone()
    fresh(torch.randn(2, 1, 32, 16))
    assert torch.equal(codebook, fresh.quantiser_top.codebook)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_does_not_reach_the_quantiser():
    plain, cast = quantiser(), quantiser()
    z = torch.randn(2, 4, 8, 8)
    out = plain(z)
    with torch.autocast("cpu", torch.bfloat16):
        out_cast = cast(z)
    assert out_cast.vectors.dtype == torch.float32
    assert torch.equal(out.codes, out_cast.codes)
    assert torch.equal(plain.codebook, cast.codebook)


@pytest.mark.parametrize(
    "stride, rate", [(2, 2.8125), (4, (2048 + 512) * 9 / 32768), (8, 0.17578125)]
)
def test_stride_sets_the_maps_and_the_rate(stride, rate):
    config = VQVAE2Config(stride=stride)
    model, x = VQVAE2(config).eval(), torch.randn(1, 1, 32, 16)
    top, bottom = model.encode(x)
    assert top.shape == (1, 16 // stride, 8 // stride)
    assert bottom.shape == (1, 32 // stride, 16 // stride)
    assert top.dtype == bottom.dtype == torch.int64
    assert model.decode_codes(top, bottom).shape == model(x).reconstruction.shape == x.shape
    assert config.bits_per_pixel(256, 128) == rate  # 0.703 by default: 2560 codes of 9 bits
