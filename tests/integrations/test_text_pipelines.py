"""The examples from text to images and videos, on tiny pipelines of the real classes: files, resuming, processes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="these pipelines have text encoders")

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stablevm import UserError
from stablevm.integrations import benchmark_prompts, text_pipelines
from stablevm.support.launcher import Place
from stablevm.support.processes import Process
from tests.helpers.tiny_pipelines import tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEDULERS = {
    "sd35": ("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler),
    "flux": ("FluxPipeline", FlowMatchEulerDiscreteScheduler),
    "qwen": ("QwenImagePipeline", FlowMatchEulerDiscreteScheduler),
    "wan": ("WanPipeline", UniPCMultistepScheduler),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each pipeline, saved with its text encoders and tokenizers."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, (pipeline, scheduler) in SCHEDULERS.items():
        config = text_pipelines.PIPELINES[name].scheduler
        tiny_pipeline(pipeline, scheduler.from_config(dict(config))).save_pretrained(folder / name)
    return folder


def run(name, *arguments, monkeypatch):
    """The example's `main`, as if it were started with these arguments."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def images(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_images_of_each_model_as_geneval_reads_them(folders, tmp_path, monkeypatch, capsys):
    lines = ['{"tag": "colors", "prompt": "a red cat"}', '{"tag": "counting", "prompt": "two dogs"}']
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    models = ",".join(f"{name}={folders / name}" for name in ("sd35", "flux", "qwen"))
    options = ("--models", models, "--prompts", prompts, "--output-dir", tmp_path / "out", "--resolution", 16,
               "--num-steps", 4, "--fast-low-low-substeps", 1, "--num-images", 2)  # fmt: skip
    run("stablevs_text_to_image.py", *options, "--sampler", "custom_euler", monkeypatch=monkeypatch)
    for name in ("sd35", "flux", "qwen"):
        folder = tmp_path / "out" / name / "4steps-custom_euler-sp0.85-sb1-nf0"
        assert images(folder) == [f"0000{i}/samples/000{j}.png" for i in range(2) for j in range(2)]
        assert [json.loads((folder / f"0000{i}" / "metadata.jsonl").read_text()) for i in range(2)] == [
            json.loads(line) for line in lines
        ]
    pictures = [Image.open(folder / name).tobytes() for name in images(folder)]
    assert pictures[0] != pictures[1] and pictures[:2] != pictures[2:], "seeds and prompts matter"
    (folder / "00001/samples/0001.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    run("stablevs_text_to_image.py", *options, "--sampler", "custom_euler", monkeypatch=monkeypatch)
    assert [Image.open(folder / name).tobytes() for name in images(folder)] == pictures
    assert {path: path.stat().st_mtime_ns for path in before} == before, "only what was missing is made"
    assert "all samples are there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .*holds samples with seed 0, not 5; name another folder"):
        run("stablevs_text_to_image.py", *options, "--sampler", "custom_euler", "--seed", 5, monkeypatch=monkeypatch)


def test_processes_share_the_samples_and_noise_is_a_samples_own(folders, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\na bird\n")
    made = []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            run("stablevs_text_to_image.py", "--models", f"sd35={folders / 'sd35'}", "--prompts", prompts,
                "--output-dir", out, "--resolution", 16, "--num-steps", 3, "--sampler", "custom_dpm",
                "--low-region-noise-factor", 1.0, monkeypatch=monkeypatch)  # fmt: skip
            if (rank, world_size) == (0, 2):
                assert [path[:5] for path in images(out / "sd35")] == ["3step"] * 2, "the first and the third"
        folder = next((out / "sd35").iterdir())
        assert images(folder) == [f"0000{i}/samples/0000.png" for i in (0, 2, 3)]
        made.append([Image.open(folder / name).tobytes() for name in images(folder)])
    assert made[0] == made[1]


def test_videos_as_t2v_compbench_reads_them(folders, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    import imageio

    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "1_consistent_attr.txt").write_text("a red cat\na blue dog\n")
    (prompts / "7_numeracy.txt").write_text("two birds\n")
    options = ("--model_id", folders / "wan", "--prompts_dir", prompts, "--save_dir", tmp_path / "videos",
               "--height", 32, "--width", 32, "--num_frames", 5, "--num_steps", 4,
               "--fast_low_low_substeps", 1)  # fmt: skip
    run("stablevs_text_to_video.py", *options, "--categories", "consistent_attr", monkeypatch=monkeypatch)
    folders_made = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert folders_made == ["3steps-unipc", "4steps-custom_unipc-sp0.85-sb1-nf0", "4steps-unipc"]
    for folder in (tmp_path / "videos").iterdir():
        videos = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
        assert videos == ["consistent_attr/0001.mp4", "consistent_attr/0002.mp4"]
        assert sum(1 for _ in imageio.get_reader(folder / videos[0])) == 5
    with pytest.raises(SystemExit, match=r"categories other: expected any of consistent_attr, numeracy"):
        run("stablevs_text_to_video.py", *options, "--categories", "other", monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", ["stablevs_text_to_image.py", "stablevs_text_to_video.py"])
def test_noise_levels_are_printed_without_a_model(name, monkeypatch, capsys):
    run(name, "--print-sigmas-only", monkeypatch=monkeypatch)
    told = capsys.readouterr().out
    published = "0.8513 0.8314 0.7878 0.7380 0.6808 0.6143 0.4915 0.3887 0.2626 0.1043 0.0000"
    if name == "stablevs_text_to_image.py":
        assert "sp0.85-sb9-nf0, 20 evaluations: 1.0000" in told and published in told
        assert told.count("30steps-euler, 30 evaluations") == 3
    else:
        assert "30steps-unipc, 30 evaluations: 1.0000" in told and "20steps-unipc, 20 evaluations" in told


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_those_of_the_pipeline(folders, name):
    """The pipeline itself chooses them from its image's size."""
    pipe = text_pipelines.load_pipeline(str(folders / name), Process(0, 1, torch.device("cpu")))
    config, known = pipe.scheduler.config, text_pipelines.PIPELINES[name].at(str(folders / name))
    side = (
        32 * 8 // pipe.vae_scale_factor if hasattr(pipe, "vae_scale_factor") else 32
    )  # tiny autoencoders enlarge less
    for kind in ("euler", "custom_euler", "custom_unipc", "custom_dpm"):
        sampler = text_pipelines.Sampler(kind, 4, steps_below=1)
        pipe.scheduler = sampler.scheduler(config)
        with torch.random.fork_rng(devices=[]):
            size = {"height": 32, "width": 32} | ({"num_frames": 1} if name == "wan" else {})
            pipe("a cat", num_inference_steps=4, output_type="latent", **size)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(sampler.noise_levels(known, side, side), abs=1e-6), kind


def test_prompts_and_samplers_are_checked(tmp_path):
    bad = tmp_path / "prompts.jsonl"
    bad.write_text('{"prompt": "a"}\n["b"]\n')
    with pytest.raises(UserError, match='line 2: expected a JSON object with a "prompt"'):
        benchmark_prompts.read_geneval(bad)
    with pytest.raises(UserError, match="can't be read: No such file"):
        benchmark_prompts.read_geneval(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no prompts; expected a file"):
        benchmark_prompts.read_compbench(tmp_path)
    with pytest.raises(UserError, match="sampler eular: expected one of euler, dpm, unipc, custom_euler"):
        text_pipelines.Sampler("eular", 4).scheduler({"shift": 3.0})
    with pytest.raises(UserError, match=r"split_time 1\.5: expected"):
        text_pipelines.Sampler("custom_dpm", 4, split_time=1.5).scheduler({"shift": 3.0})
    with pytest.raises(UserError, match=r"no model_index\.json; expected the folder of a pipeline of diffusers"):
        text_pipelines.load_pipeline(str(tmp_path), Process(0, 1, torch.device("cpu")))
    known = text_pipelines.PIPELINES["sd35"]
    few, many = (text_pipelines.SamplingOptions(num_steps=n).samplers("custom_euler", known, 16, 16) for n in (4, 30))
    assert [sampler.steps for sampler in few] == [4, 4] and [sampler.steps for sampler in many] == [30, 20, 30]
    samples = benchmark_prompts.geneval_samples([{"prompt": "a"}, {"prompt": "b"}], 2, 7)
    assert [sample.seed for sample in samples] == [7, 1007, 7, 1007]
    assert benchmark_prompts.missing(samples, tmp_path, Place(1, 2)) == samples[1::2]
