"""What an evaluation refuses, each with one line, before it writes anything."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from stablevm.evaluation.config import ReferenceConfig
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.reference import reference
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.evaluations import FAKE, REAL, refusal, save_images


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"images": FAKE}, "holds no arr_0"),
        ({"arr_0": FAKE.astype(np.float32) * np.nan}, "images of type float32, expected uint8"),
        ({"arr_0": FAKE[..., 0]}, "grey images"),
        ({"arr_0": FAKE[..., :1]}, "grey images"),
        ({"arr_0": FAKE.transpose(0, 3, 1, 2)}, r"expected (N, H, W, 3)"),
        ({"arr_0": FAKE[:0]}, "no images"),
        ({"arr_0": FAKE[:3]}, "3 samples images, too few for a covariance"),
        ({"arr_0": FAKE, "labels": np.arange(3)}, "labels are int64 (3,)"),
    ],
)
def test_bad_samples_get_one_clear_line(options, samples, message):
    assert message in refusal(options(samples=samples))


def test_bad_options_get_one_clear_line(options, tmp_path):
    assert "--no-inception: expected an --enc-type to use" in refusal(options(inception=False))
    assert "--batch-size 0" in refusal(options(batch_size=0))
    assert "stablevm reference" in refusal(options(reference=tmp_path))
    assert "no such file" in refusal(options(reference=tmp_path / "absent.npz"))


def test_results_of_another_evaluation_are_not_replaced(options, tmp_path):
    """But by the same evaluation: with the reference at another place, with samples that have changed, with more."""
    four, output = {"arr_0": FAKE[:4]}, tmp_path / "samples.json"
    config = options(samples=four, real={"arr_0": REAL[:4]})
    first = evaluate(config)
    moved = config.reference.rename(tmp_path / "moved.npz")
    config = dataclasses.replace(options(samples={"arr_0": FAKE[4:8]}, real={"arr_0": REAL[:5]}), reference=moved)
    second = evaluate(config)
    assert first["sha256"] == second["sha256"] and json.loads(output.read_text()) == second != first
    assert "another evaluation (differing in reference)" in refusal(options(real={"arr_0": REAL[:5]}))
    more = {**second, "sha256": {**second["sha256"], "encoder": "0" * 64}}
    output.write_text(json.dumps(more))
    assert "another evaluation (differing in encoder)" in refusal(config)
    for other in ({**second, "sha256": None}, {"mine": 1}):
        output.write_text(json.dumps(other))
        assert "holds no results of an evaluation by this version: give --output another name" in refusal(config)
    output.write_text("")
    assert "give --output another name" in refusal(config)


def test_broken_weights_are_named(options, home, tmp_path):
    weights = torch.load(home / "weights.pth", weights_only=True)
    weights["Mixed_7c.branch1x1.conv.weight"][0, 0] = torch.nan
    torch.save(weights, tmp_path / "broken.pth")
    four = {"arr_0": FAKE[:4]}
    config = options(samples=four, real={"arr_0": REAL[:4]}, inception_weights=tmp_path / "broken.pth")
    assert "4 of 4 rows of features hold NaN" in refusal(config)


def test_outputs_never_replace_what_is_read_or_another_output(options, home, tmp_path):
    """All that is read against all that is written, by other spellings and links too; nothing is touched."""
    config = options(encoder_weights=home / "weights.pth")
    (tmp_path / "sub").mkdir()
    (tmp_path / "page.html").symlink_to(config.samples)
    (tmp_path / "link.json").symlink_to(config.reference)
    np.savez(tmp_path / "x", arr_0=FAKE)
    for name in ("x.json", "x.html"):
        (tmp_path / name).write_bytes((tmp_path / "x.npz").read_bytes())
    images = save_images(tmp_path / "images", FAKE[:4])
    (images / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for given, message in (
        ({"output": config.samples}, "--output would replace"),
        ({"output": tmp_path / "sub" / ".." / "samples.npz"}, "--output would replace"),
        ({"output": tmp_path / "link.json"}, "--output would replace"),
        ({"output": config.reference}, "--output would replace"),
        ({"output": home / "weights.pth"}, "--output would replace"),
        ({"output": tmp_path / "page.json", "report": True}, "--report would replace"),
        ({"samples": tmp_path / "x.json"}, "--output would replace"),
        ({"samples": tmp_path / "x.html", "report": True}, "--report would replace"),
        ({"reference": tmp_path / "x.json", "output": tmp_path / "x.json"}, "--output would replace"),
        ({"output": tmp_path / "new.html", "report": True}, "which is --output too"),
        ({"samples": images, "output": images / "notes.txt"}, "--output would replace"),
        ({"samples": images, "output": images / "00.png"}, "--output would replace"),
        ({"output": tmp_path / "sub"}, "is a folder"),
        ({"output": config.samples / "x.json"}, "--output .*samples.npz"),
        ({"output": config.samples / "sub" / "x.json"}, "--output .*samples.npz"),
        ({"cache_dir": config.samples}, "--cache-dir"),
        ({"cache_dir": config.samples / "x"}, "--cache-dir"),
        ({"output": tmp_path / "both", "cache_dir": tmp_path / "both"}, "--output would replace"),
    ):
        changed = dataclasses.replace(config, **given)
        with pytest.raises(UserError, match=message) as error:
            evaluate(changed)
        one_line(error)
    for given, message in (
        ({"output": tmp_path / "sub" / ".." / "x.npz", "source": tmp_path / "x.npz"}, "--output would replace"),
        ({"output": tmp_path / "dir.npz"}, "is a folder"),
        ({"cache_dir": config.samples}, "--cache-dir"),
    ):
        (tmp_path / "dir.npz").mkdir(exist_ok=True)
        defaults = {"source": images, "output": tmp_path / "r.npz", "transform": "none", "statistics": False}
        with pytest.raises(UserError, match=message) as error:
            reference(ReferenceConfig(**(defaults | given)))
        one_line(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
