"""evaluation.inception against TensorFlow 1's resize written from scratch, and sFID's layout by construction."""

import hashlib
import urllib.error

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stablevm.evaluation.extractors import PUBLISHED_SHA256, load_inception
from stablevm.support.errors import UserError
from tests.helpers import inception
from tests.helpers.data_sets import one_line


@pytest.fixture(scope="module")
def weights():
    return inception.random_weights()


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights_file):
    return load_inception(weights_file)


def tensorflow_1_resize(image, side):
    """tf.image.resize_bilinear, align_corners=False, of one (H, W, 3) image: output i reads at i * size / side, the
    neighbour beyond the edge is the edge, and nothing is averaged where the image shrinks. Positions are float32."""
    height, width, _ = image.shape
    result = np.empty((side, side, 3))
    for i in range(side):
        y = np.float32(i) * (np.float32(height) / np.float32(side))
        top, bottom, down = int(y), min(int(y) + 1, height - 1), y - int(y)
        for j in range(side):
            x = np.float32(j) * (np.float32(width) / np.float32(side))
            left, right, across = int(x), min(int(x) + 1, width - 1), x - int(x)
            upper = image[top, left] * (1 - across) + image[top, right] * across
            lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
            result[i, j] = upper * (1 - down) + lower * down
    return result


@pytest.mark.parametrize("size", [(8, 12), (400, 320)])
def test_the_network_sees_tensorflow_1s_resize_and_normalisation(extractor, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    seen = []
    handle = extractor._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(torch.from_numpy(image).permute(2, 0, 1)[None])
    handle.remove()
    expected = (tensorflow_1_resize(image.astype(np.float64), 299) - 128) / 128
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_spatial_features_are_seven_channels_last(extractor):
    """Channel c of the branch is made c + 1 everywhere but at one position, where it is ten times that."""
    images = inception.smooth_images(2, 16, seed=1).permute(0, 3, 1, 2)
    planted = torch.zeros(2, 192, 17, 17) + torch.arange(1, 193).view(1, -1, 1, 1)
    planted[:, :, 3, 5] *= 10
    branch = extractor._network.Mixed_6d.branch1x1
    handle = branch.register_forward_hook(lambda module, inputs, output: output.copy_(planted))
    branch._forward_hooks.move_to_end(handle.id, last=False)  # before the extractor's own hook
    spatial = extractor(images)["spatial"]
    handle.remove()
    assert spatial.shape == (2, 2023)
    expected = torch.arange(1.0, 8).repeat(17 * 17)
    position = 3 * 17 + 5
    expected[7 * position : 7 * position + 7] *= 10
    assert torch.equal(spatial, expected.expand(2, -1))


def test_spatial_features_come_after_batch_norm_and_relu(extractor):
    images = inception.smooth_images(2, 16, seed=1).permute(0, 3, 1, 2)
    inputs = []
    block = extractor._network.Mixed_6d
    handle = block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].clone()))
    spatial = extractor(images)["spatial"].view(2, 17, 17, 7)
    handle.remove()
    conv, norm = block.branch1x1.conv, block.branch1x1.bn
    plain = torch.einsum("bihw,oi->bhwo", inputs[0], conv.weight[:7, :, 0, 0])
    scale = norm.weight[:7] / (norm.running_var[:7] + norm.eps).sqrt()
    expected = ((plain - norm.running_mean[:7]) * scale + norm.bias[:7]).clamp(min=0)
    torch.testing.assert_close(spatial, expected, rtol=1e-3, atol=1e-4)
    assert 0 < (spatial == 0).double().mean() < 1


def test_logits_leave_the_bias_out(extractor, weights):
    pool = torch.rand(5, 2048, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extractor.logits(pool), pool @ weights["fc.weight"].T)
    assert weights["fc.bias"].abs().max() > 0


def test_other_weights_are_never_called_the_published_ones(extractor, weights, tmp_path):
    assert not extractor.published and "other weights" in extractor.name
    save_file(weights, tmp_path / "weights.safetensors")
    again = load_inception(tmp_path / "weights.safetensors")
    assert again.fingerprint == extractor.fingerprint
    changed = {**weights, "fc.bias": weights["fc.bias"] + 1}
    save_file(changed, tmp_path / "changed.safetensors")
    assert load_inception(tmp_path / "changed.safetensors").fingerprint != extractor.fingerprint


def test_no_network_and_no_file_is_one_clear_line(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"can't be downloaded .*no route to host.*--inception-weights") as error:
        load_inception(None)
    one_line(error)


def test_the_download_is_checked_and_done_once(monkeypatch, tmp_path, weights_file):
    """A stand-in whose hash passes for the published one; then the same file, damaged."""
    content, asked = weights_file.read_bytes(), []
    monkeypatch.setattr("stablevm.evaluation.extractors.PUBLISHED_SHA256", hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        (tmp_path / "checkpoints" / url.rsplit("/", 1)[-1]).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert load_inception(None).published and load_inception(None).name == "Inception 2015-12-05"
    assert len(asked) == 1 and asked[0][1] == hashlib.sha256(content).hexdigest()[:8]
    assert asked[0][0].endswith(f"-{PUBLISHED_SHA256}.pth"), "the library's file is named by its hash"
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="damaged"):
        load_inception(None)


def test_unfit_weights_are_named(tmp_path, weights):
    for name, write, message in (
        ("absent.pth", lambda path: None, "no such file"),
        ("text.pth", lambda path: path.write_text("x"), "not safetensors nor a torch file"),
        ("list.pth", lambda path: torch.save([1], path), "expected named tensors, found list"),
        ("other.pth", lambda path: torch.save({"weight": torch.ones(2)}, path), "not the weights of"),
        ("text.safetensors", lambda path: path.write_text("x"), "not safetensors nor a torch file"),
    ):
        write(tmp_path / name)
        with pytest.raises(UserError, match=message) as error:
            load_inception(tmp_path / name)
        one_line(error)
