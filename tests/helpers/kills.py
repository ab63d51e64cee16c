"""Kill a preparing command at random moments until it is done.

    python -m tests.helpers.kills SOURCE VAE FOLDER --kills 20

Each step is first run through, then killed as often as asked, and the two results are compared byte by byte. kill.py
beside it kills at every file operation of forked processes; this one at moments that the clock chooses, of commands as
users start them, with images in any number: between operations, and while the program starts or ends.
"""

import argparse
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps(folder, source, vae, side):
    """(program, arguments, folder of the result) of each step of both routes."""
    crop = ["--source", str(source), "--resolution", f"{side}x{side}", "--num-workers", "1"]
    crop += ["--transform", "center-crop-dhariwal"]
    images, latents, shards, packed = (folder / name for name in ("DATA/images", "DATA/vae-sd", "shards", "packed"))
    archive = folder / "archive" / "images.zip"
    model = ["--vae", str(vae), "--num-workers", "1", "--batch-size", "8"]
    return [
        ("dataset_tools", ["convert", *crop, "--dest", str(images)], images),
        ("dataset_tools", ["convert", *crop, "--dest", str(archive)], archive.parent),
        ("dataset_tools", ["encode", "--source", str(images), "--dest", str(latents), *model], latents),
        ("prepare", ["pack", "--source", str(folder / "DATA"), "--dest", str(packed)], packed),
        ("prepare", ["convert", *crop, "--dest", str(shards)], shards),
        ("prepare", ["encode", "--data-dir", str(shards), *model], shards),
    ]


def command(program, arguments):
    """The words that start it as a process of its own."""
    programs = {
        "dataset_tools": [str(ROOT / "preprocessing" / "dataset_tools.py")],
        "prepare": ["-m", "stablevm", "prepare"],
    }
    return [sys.executable, *programs[program], *arguments]


def finish_despite_kills(arguments, kills, longest, stream):
    """Run a command again and again, killing it after up to `longest` seconds `kills` times; returns the kills done."""
    done = 0
    while True:
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        if done < kills:
            time.sleep(stream.uniform(0.0, longest))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                done += 1
                continue
        _, errors = process.communicate()
        assert process.returncode in (0, 3), errors
        if done >= kills or process.returncode in (0, 3):
            return done


def same(one, other):
    compared = filecmp.dircmp(one, other)
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    _, differing, failed = filecmp.cmpfiles(one, other, compared.common_files, shallow=False)
    return not differing and not failed and all(same(one / name, other / name) for name in compared.common_dirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("source", "vae", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    stream, converted = random.Random(0), options.folder / "converted"
    clean = steps(options.folder / "clean", options.source, options.vae, options.side)
    harassed = steps(options.folder / "killed", options.source, options.vae, options.side)
    for (program, once, expected), (_, again, result) in zip(clean, harassed, strict=True):
        began = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        assert subprocess.run(command(program, once), **quiet).returncode in (0, 3)
        seconds = time.perf_counter() - began
        killed, rounds, verdict = 0, 0, "identical"
        while killed < options.kills:  # a round ends when the work is done, however often it was killed
            shutil.rmtree(result, ignore_errors=True)
            if again[0] == "encode" and program == "prepare":
                shutil.copytree(converted, result)
            longest = 3 + 3 * seconds / options.kills
            killed += finish_despite_kills(command(program, again), options.kills - killed, longest, stream)
            rounds += 1
            verdict = verdict if same(expected, result) else "DIFFERENT"
        print(f"{program} {again[0]}: {seconds:.1f} s alone; {killed} kills, done {rounds} x: {verdict}", flush=True)
        if program == "prepare" and again[0] == "convert":
            shutil.copytree(result, converted)


if __name__ == "__main__":
    main()
