"""Evaluation by two processes against one, memory against particles and images, and what ten million images take.

python benchmarks/scaling.py --root data

Importance sampling of a VAE with layers 784-200-200-50 on random bits; its weights are untrained, on which neither time
nor memory depends. It takes a few minutes, and a machine that does nothing else: every process has a core of its own.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ratios import add_ratio, ratios
from report import Report, machine

import pyro_vae as pv
from pyro_vae import distributed

ROUNDS, MEMORY_ROUNDS = 5, 3
IMAGES, PARTICLES = 32, 5000  # of a round: 8 blocks
JOB = {"images": 10_000_000, "particles": 5000}
FEW, MANY = (4, 100), (4, 100_000)  # images and particles
SHORT, LONG = (100, 20), (10_000, 20)
FILL = (4, 10_000)  # the warm-up: 20 full blocks
HERE = Path(__file__)


def vae() -> torch.nn.Module:
    torch.manual_seed(0)
    return pv.models.VAE(pv.Binary((28, 28)), latent_dim=50, hidden_dims=(200, 200))


def bits(num: int) -> pv.Batch:
    draw = torch.rand(num, 28, 28, generator=torch.Generator().manual_seed(0))
    return pv.Batch((draw < 0.2).float(), space=pv.Binary((28, 28)))


def score(model: torch.nn.Module, batch: pv.Batch, num_particles: int) -> tuple[float, float]:
    """Seconds and CPU seconds of this process."""
    started, cpu = time.perf_counter(), time.process_time()
    pv.log_likelihood(model, batch, estimator=pv.importance_sampling(num_particles), device="cpu")
    return time.perf_counter() - started, time.process_time() - cpu


# Two processes and one


def worker(out: Path) -> None:
    """Both processes on the same images, then the first one alone while the other sleeps, in every round."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model, batch, rows = vae(), bits(IMAGES), []
    for _ in range(ROUNDS + 1):
        with distributed.processes("cpu"):
            distributed.wait()
            together, cpu = score(model, batch, PARTICLES)
        alone = score(model, batch, PARTICLES) if rank == 0 else (0.0, 0.0)
        torch.distributed.barrier()
        rows.append({"together": together, "together_cpu": cpu, "alone": alone[0], "alone_cpu": alone[1]})
    if rank == 0:
        out.write_text(json.dumps(rows[1:]))  # the first does not count
    torch.distributed.destroy_process_group()


def scaling(report: Report, folder: Path) -> float:
    """The row, and image-samples per second of one process on one core."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    subprocess.run([*torchrun, str(HERE), "--worker", str(folder / "rounds.json")], check=True, env=environment())
    rows = json.loads((folder / "rounds.json").read_text())
    found = {name: [row[name] for row in rows] for name in rows[0]}
    rates = {name: IMAGES * PARTICLES / statistics.median(found[name]) for name in ("alone", "together")}
    add_ratio(
        report,
        "evaluation, 2 processes on 2 cores : 1 process on 1 core",
        ratios(found["alone"], found["together"]),
        bar=">= 1.8",
        images=IMAGES,
        particles=PARTICLES,
        image_samples_per_second=rates,
        image_samples_per_cpu_second=IMAGES * PARTICLES / statistics.median(found["alone_cpu"]),
        ratio_of_cpu_seconds=statistics.median(ratios(found["alone_cpu"], found["together_cpu"])),
    )
    return rates["alone"]


# Memory


def memory(path: Path, num_images: int, num_particles: int) -> None:
    """Print what a fresh process holds at most, in MiB, that evaluates images which stay on disk.

    Pages that are a copy of a file (libraries, images) are left out: the system takes them back when it needs memory.
    """
    torch.set_num_threads(1)
    data, model = pv.load_data(path, space="binary"), vae()
    score(model, bits(1), 2)
    before = status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    score(model, bits(FILL[0]), FILL[1])
    batch = data.test if num_images == len(data.test) else data.test.subset(num_images)
    score(model, batch, num_particles)
    print(json.dumps({"peak": status("VmHWM") - status("RssFile"), "before": before, "resident": status("VmHWM")}))


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def growth(report: Report, folder: Path, what: str, smaller: tuple[int, int], larger: tuple[int, int]) -> None:
    """The ratio of the peaks of whole processes, and what each is above a process that has scored one image."""
    found: dict[str, list[float]] = {"smaller": [], "larger": [], "smaller_above": [], "larger_above": []}
    for _ in range(MEMORY_ROUNDS):
        for name, (num_images, num_particles) in (("smaller", smaller), ("larger", larger)):
            command = [sys.executable, str(HERE), "--memory", str(folder / str(num_images)), str(num_particles)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
            measured = json.loads(done.stdout)
            found[name].append(measured["peak"])
            found[f"{name}_above"].append(measured["peak"] - measured["before"])
    add_ratio(
        report,
        f"peak memory of an evaluation, {what}",
        ratios(found["larger"], found["smaller"]),
        bar="<= 1.1",
        mib={name: statistics.median(values) for name, values in found.items()},
    )


def write_images(folder: Path, num: int) -> None:
    """Bits as bytes in a folder of .npy files; as few for training and validation as are allowed."""
    (folder / str(num)).mkdir()
    for name, count in (("train", 1), ("valid", 1), ("test", num)):
        np.save(folder / str(num) / f"{name}.npy", bits(count).obs.numpy().astype(np.uint8))


# What a large job takes


def large_job(report: Report, rate: float, results: Path) -> None:
    """Ten million images x 5,000 particles, from what a core does in a second, and a GPU if one was measured."""
    samples = math.prod(JOB.values())
    row = {"row": "10 million images x 5,000 particles", **JOB, "cpu_core_hours": samples / rate / 3600}
    measured = {path.name: gpu_rate(path) for path in sorted(results.glob("gpu_cuda*.json"))}
    for name, (device, gpu) in measured.items():
        hours = samples / gpu / 3600
        report.add(**row, gpu=device, gpu_file=name, gpu_hours=hours, gpus_for_one_day=math.ceil(hours / 24))
    if not measured:
        report.add(**row, gpu=None, note="no GPU figure has been measured: benchmarks/gpu.py gives one")


def gpu_rate(path: Path) -> tuple[str, float]:
    """The device and the image-samples per second of the VAE."""
    contents = json.loads(path.read_text())
    rates = [row["image_samples_per_second"] for row in contents["rows"] if row.get("model") == "vae"]
    return contents["device"], rates[0]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="not used: the images are drawn")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--worker", type=Path, help="one of two processes, as this file starts them")
    parser.add_argument("--memory", nargs=2, help="one process that measures its memory, as this file starts it")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    if arguments.memory:
        path = Path(arguments.memory[0])
        return memory(path, int(path.name), int(arguments.memory[1]))
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two processes need two cores, found one")
    torch.set_num_threads(1)
    report = Report(arguments.out / "bench_scaling.json", {"benchmark": "scaling", **machine(torch.device("cpu"))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rate = scaling(report, folder)
        for num in sorted({FEW[0], SHORT[0], LONG[0]}):
            write_images(folder, num)
        growth(report, folder, f"K from {FEW[1]} to {MANY[1]:,} ({FEW[0]} images)", FEW, MANY)
        growth(report, folder, f"n from {SHORT[0]} to {LONG[0]:,} (K = {SHORT[1]})", SHORT, LONG)
    large_job(report, rate, arguments.out)


if __name__ == "__main__":
    main()
