"""Speed of exported agents (export.py) against other ways to run the same sparse network.

    python benchmark/speed_export.py                     # the whole table, about 15 minutes
    python benchmark/speed_export.py --networks cnn-512 --sparsities 0.95

Networks have a script's own random weights, pruned by magnitude with its ERK densities; they act on
real observations of random play. One thread, one observation at a time. Engines are measured in
turn, in blocks of 25 different observations, and the median block is shown, because machines
drift. "C" is a loop in C, all the others are called from Python; "agent.py" is the same C called
from Python, "empty" what ONNX Runtime takes for a model that does nothing. The last columns are of
a fresh process: its peak memory, and the time from its start to the first action.

Needs the extra `export`: pip install -e ".[export]".
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cleanrl_sparse"))

import numpy as np

ENGINES = (
    *("C fp32", "C fp16", "C int8", "agent.py fp32", "agent.py int8", "NumPy"),
    *("ORT fp32", "ORT int8 dynamic", "ORT int8 static", "torch", "SciPy CSR"),
)
LOOP = r"""
#include "agent.c"
void loop(agent_state *s, const OBSERVATION *observations, int n, float *action);
void loop(agent_state *s, const OBSERVATION *observations, int n, float *action)
{
    int i;
    for (i = 0; i < n; i++)
        ACT
}
"""


@dataclass
class Args:
    """Flags; lists are measured in all combinations."""

    # cnn-UNITS, impala-UNITS, rainbow-UNITS or sac-UNITS
    networks: tuple[str, ...] = ("cnn-512", "cnn-2048", "sac-256", "sac-1280")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)  # each in (0, 1)
    engines: tuple[str, ...] = ENGINES  # what runs the network
    blocks: int = 60  # timed blocks of 25 actions per engine (>= 1)
    observations: int = 500  # different observations (>= 100)
    actions: int = 6  # of the network (>= 1)
    processes: bool = True  # measure fresh processes too
    child: str = ""  # of the script's own use: the engine of a fresh process
    folder: str = ""  # of the script's own use


def make_run(folder: Path, network: str, sparsity: float, actions: int) -> None:
    """Write FOLDER/model.safetensors, as a run of the training script would."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kind, units = network.split("-")
    flags: dict[str, Any]
    if kind == "sac":
        script = importlib.import_module("sac_mujoco_gmp")
        module, flags = script.Actor(17, actions, int(units), 2), {"env_id": "HalfCheetah-v5"}
    else:
        name = "rainbow_resnet_gmp" if kind == "rainbow" else "dqn_atari_gmp"
        script, flags = importlib.import_module(name), {"env_id": "Breakout"}
        body = "cnn" if kind == "cnn" else "impala"
        args = script.Args(feature_size=int(units), network=body)
        module = (script.C51Network if kind == "rainbow" else script.QNetwork)(actions, args)
    script.add_masks(module)
    script.prune(module, script.erk_densities(module, sparsity), np.random.default_rng(0))
    with torch.no_grad():
        for weight, mask in zip(script.prunable(module).values(), module.buffers()):
            weight.mul_(mask)
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-0.02, 0.02)
    prefix = "actor." if kind == "sac" else ""
    weights = {prefix + k: p.detach() + 0.0 for k, p in module.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"flags": json.dumps({"script": f"{script.__name__}.py"} | flags)}
    save_file(weights, folder / "model.safetensors", metadata)


def prepare(folder: Path, args: Args) -> None:
    """Export a run in all forms, and write observations."""
    import export

    network = None
    for kind in ("fp32", "fp16", "int8"):
        network, _, _ = export.export(*export.load_model(folder), folder / kind, kind)
    assert network
    path = folder / "obs.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        shape = (8, network.actions) if network.family == export.ACTOR else 8
        draw: Any = rng.uniform if network.family == export.ACTOR else rng.integers
        low, high = (-1, 1) if network.family == export.ACTOR else (0, 3)
        np.save(
            path,
            export.observations(network, args.observations, 0, lambda _: draw(low, high, shape)),
        )
    if any("ORT" in engine for engine in args.engines):
        write_onnx(folder, np.load(path))


def write_onnx(folder: Path, obs: np.ndarray) -> None:
    """Write the network as fp32.onnx, dynamic.onnx and static.onnx, each as small as it gets."""
    import export
    import onnx
    from onnxruntime import quantization as q

    flags, weights = export.load_model(folder)
    export.write_onnx(flags, weights, folder / "fp32.onnx")
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "empty", [one], [two])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "empty.onnx"
    )
    source, ready = str(folder / "fp32.onnx"), str(folder / "ready.onnx")
    q.quant_pre_process(source, ready, skip_symbolic_shape=True)
    # unsigned activations: fast without VNNI too
    q.quantize_dynamic(source, folder / "dynamic.onnx", weight_type=q.QuantType.QInt8)

    class Reader(q.CalibrationDataReader):
        """The first 100 observations."""

        def __init__(self) -> None:
            self.left = iter(obs[:100])

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.left, None)
            return None if x is None else {"observation": x[None].astype(np.float32)}

    q.quantize_static(
        ready,
        folder / "static.onnx",
        Reader(),
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        extra_options={"ActivationSymmetric": False},
        reduce_range=True,
    )


def engine(name: str, folder: Path, obs: np.ndarray) -> Callable[[int, int], Any]:
    """Return a function that acts on observations i to j, by the engine of this name."""
    how, _, kind = name.partition(" ")
    if how in ("C", "agent.py", "NumPy"):
        import importlib.util

        place = folder / (kind or "fp32")
        spec = importlib.util.spec_from_file_location(f"agent_{how}_{kind}", place / "agent.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        agent = module.Agent(place, how != "NumPy")
        if how != "C":
            return lambda i, j: [agent.act(x) for x in obs[i:j]]
        actor = agent.family == 0
        code = LOOP.replace("OBSERVATION", "float" if actor else "unsigned char")
        size = obs[0].size
        call = f"agent_act(s, observations + {size} * i, action);"
        call = call if actor else f"action[0] = (float)agent_act(s, observations + {size} * i);"
        (place / "loop.c").write_text(code.replace("ACT", call))
        flags = [*module.FLAGS, "-march=native", "-I", str(place)]
        command = ["cc", *flags, str(place / "loop.c"), "-o", str(place / "loop.so"), "-lm"]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(place / "loop.so"))
        state = ctypes.create_string_buffer(library.agent_state_size())
        data = agent.data
        assert (
            library.agent_init(state, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)))
            == 0
        )
        action = np.zeros(agent.actions, np.float32)
        step = obs[0].nbytes

        def run(i: int, j: int) -> Any:
            start = ctypes.c_void_p(obs.ctypes.data + i * step)
            library.loop(state, start, j - i, ctypes.c_void_p(action.ctypes.data))
            return data is not None

        return run
    if how in ("ORT", "empty"):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = folder / f"{'empty' if how == 'empty' else kind.split()[-1]}.onnx"
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        if how == "empty":
            x = np.zeros(1, np.float32)
            return lambda i, j: [session.run(None, {"x": x}) for _ in range(i, j)]
        inputs = [x[None].astype(np.float32) for x in obs]  # pixels are divided in the model
        return lambda i, j: [session.run(None, {"observation": x})[0].argmax() for x in inputs[i:j]]
    import export
    import torch

    torch.set_num_threads(1)
    run_flags, weights = export.load_model(folder)
    actor = "actor.output.weight" in weights
    if how == "torch":

        def one(x: np.ndarray) -> Any:
            batch = torch.from_numpy(x[None])
            with torch.inference_mode():
                if actor:
                    return export.mean_actions(weights, batch).numpy()
                return export.q_values(weights, run_flags, batch / 255).argmax()

        return lambda i, j: [one(x) for x in obs[i:j]]
    return scipy_engine(weights, actor, obs)


def scipy_engine(weights: Any, actor: bool, obs: np.ndarray) -> Callable[[int, int], Any]:
    """Return an engine whose matrices are SciPy's CSR; convolutions, if any, are torch's."""
    import torch
    from scipy.sparse import csr_matrix
    from torch.nn import functional as F

    prefix = "actor." if actor else ""
    names = [n for n in weights if n.startswith(prefix + "dense") and n.endswith("weight")]
    names.append(f"{prefix}output.weight")
    matrices = [csr_matrix(weights[n].numpy()) for n in names]
    biases = [weights[n.replace("weight", "bias")].numpy() for n in names]

    def one(x: np.ndarray) -> Any:
        if not actor:
            with torch.inference_mode():
                y = torch.from_numpy(x[None]) / 255
                w = weights
                y = F.relu(F.conv2d(y, w["conv1.weight"], w["conv1.bias"], stride=4, padding=2))
                y = F.pad(y, (1, 2, 1, 2))
                y = F.relu(F.conv2d(y, w["conv2.weight"], w["conv2.bias"], stride=2))
                y = F.relu(F.conv2d(y, w["conv3.weight"], w["conv3.bias"], padding=1))
                x = y.permute(0, 2, 3, 1).flatten().numpy()
        for matrix, bias in zip(matrices[:-1], biases[:-1]):
            x = np.maximum(matrix @ x + bias, 0)
        return matrices[-1] @ x + biases[-1]

    return lambda i, j: [one(x) for x in obs[i:j]]


def file_of(name: str, folder: Path) -> int:
    """Return the bytes that an engine loads."""
    how, _, kind = name.partition(" ")
    if how in ("C", "agent.py", "NumPy"):
        return (folder / (kind or "fp32") / "agent.bin").stat().st_size
    if how == "ORT":
        return (folder / f"{kind.split()[-1]}.onnx").stat().st_size
    if how == "torch":
        return (folder / "model.safetensors").stat().st_size
    import export

    return sum(8 * int((w != 0).sum()) for w in export.load_model(folder)[1].values())


def child(args: Args) -> None:
    """Be a fresh process: act once and print seconds since the start and the peak memory in MB."""
    folder = Path(args.folder)
    obs = np.load(folder / "obs.npy", mmap_mode="r")[:1].copy()
    engine(args.child, folder, obs)(0, 1)
    with open("/proc/self/stat") as file:
        ticks = int(file.read().split(")")[1].split()[19])
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    with open("/proc/uptime") as file:
        took = float(file.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    print(took, peak)


def measure(args: Args, network: str, sparsity: float, root: Path) -> None:
    """Print the rows of one network."""
    folder = root / f"{network}-{sparsity}"
    make_run(folder, network, sparsity, args.actions)
    prepare(folder, args)
    obs = np.load(folder / "obs.npy")
    names = [n for n in args.engines if n != "SciPy CSR" or network.startswith(("cnn", "sac"))]
    names += ["empty"] if any("ORT" in n for n in names) else []
    engines = {name: engine(name, folder, obs) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for block in range(-2, args.blocks):
        first = block % (len(obs) // 25) * 25
        for name, run in engines.items():
            run(first, first + 5)  # its weights come back to the cache
            start = time.perf_counter()
            run(first, first + 25)
            times[name] += [(time.perf_counter() - start) / 25e-6] if block >= 0 else []
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min((medians[n] for n in names if n.startswith("ORT int8")), default=float("nan"))
    base = medians.get("ORT fp32", float("nan"))
    for name in names:
        row = f"| {network} | {sparsity:.0%} | {name} | {medians[name]:.1f} | "
        row += f"{base / medians[name]:.1f} | {best / medians[name]:.1f} |"
        if name != "empty":
            row += f" {file_of(name, folder) / 1000:,.0f} |"
            if args.processes and not name.startswith("C "):
                flags = ["--child", name, "--folder", str(folder)]
                command = [sys.executable, __file__, *flags]
                found = [
                    subprocess.run(
                        command, capture_output=True, text=True, check=True
                    ).stdout.split()
                    for _ in range(3)
                ]
                seconds = statistics.median(float(x[0]) for x in found)
                row += f" {float(found[0][1]):.0f} | {seconds:.2f} |"
        print(row, flush=True)


def main(args: Args) -> None:
    """Print a Markdown table."""
    if args.child:
        child(args)
        return
    print(
        f"{platform.processor() or platform.machine()}, one thread, {args.blocks} blocks in turn\n"
    )
    columns = (
        *("network", "sparsity", "engine", "us per action", "x ORT fp32", "x ORT's best int8"),
        *("file, kB", "peak MB", "first action, s"),
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as root:
        for network, sparsity in itertools.product(args.networks, args.sparsities):
            measure(args, network, sparsity, Path(root))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
