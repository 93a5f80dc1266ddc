"""Several ranks on this machine, forked from one process that has imported torch: `python tests/ranks.py WORK JOB ...`.

JOB `4` or `2`: so many ranks answer for the folders below WORK. Each writes WORK/answers-RANKS-RANK.pt, of each folder what
`answers` says, and, where ranks can share the tokens, what it says then. Of 4 ranks the same is asked as two meshes of 2, side by side: answers-2-0 and -1 are of the one, answers-2-2
and -3 of the other. In place of a folder there may be one for each rank in it, RANKS-RANK.

JOB `commands`: 2 ranks run each of the command lines in WORK/commands.json, as torchrun would have them, rank R in
WORK/of-R; what it writes for line L is in WORK/L-R.out and WORK/L-R.err, its exit code in WORK/L-R.code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zoo
from zoo.layout import VERSION, Slot, layout
from zoo.model import Decoder, across, rows
from zoo.model.rows import Lanes
from zoo.spec import MLP, Attention, DeltaNet, LatentAttention, Layer, Mamba, MoE, Spec

LENGTH, GIVEN = 24, 22
"""Tokens; of which a prompt, the others one by one."""


# --- small models that any number of ranks can share ---------------------------------------------------------


def evened(spec: Spec, unit: int = 4) -> Spec:
    """The same parts, of which `unit` ranks can share each: more heads, inner channels, experts and ids."""
    layers = tuple(_layer(x, unit) for x in spec.layers)
    d = _up(spec.d_model, unit)
    return dataclasses.replace(spec, layers=layers, d_model=d, vocab_size=_up(spec.vocab_size, unit))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _few(n: int, unit: int) -> int:
    """Key/value heads or groups: more than ranks, or so few that several ranks have the same one."""
    return n if unit % n == 0 else _up(n, unit)


def _layer(x: Layer, unit: int) -> Layer:
    return dataclasses.replace(
        x, mixer=_part(x.mixer, unit), beside=_part(x.beside, unit), ffn=_part(x.ffn, unit)
    )


def _part(x: Any, unit: int) -> Any:
    match x:
        case Attention(n_heads=q, n_kv_heads=k):
            return dataclasses.replace(x, n_heads=_up(q // k * _few(k, unit), unit), n_kv_heads=_few(k, unit))
        case LatentAttention(n_heads=q):
            return dataclasses.replace(x, n_heads=_up(q, unit))
        case DeltaNet(n_v_heads=v, n_k_heads=k):
            few = _up(k, unit) if x.decay == "channel" else _few(k, unit)
            return dataclasses.replace(x, n_v_heads=_up(v // k * few, unit), n_k_heads=few)
        case Mamba(n_heads=h, n_groups=g):
            return dataclasses.replace(x, n_heads=_up(h // g * _few(g, unit), unit), n_groups=_few(g, unit))
        case MLP(d_ff=f):
            return dataclasses.replace(x, d_ff=_up(f, unit))
        case MoE(n_experts=n, router=r, shared=shared):
            n = _up(n, math.lcm(unit, r.n_groups))
            return dataclasses.replace(x, n_experts=n, shared=_part(shared, unit))
    return x


def drawn(slot: Slot, of_norm: float) -> Tensor:
    """Numbers for a tensor: none that says nothing (norms of 1, biases of 0). `of_norm`: what a norm's weight is about."""
    g = torch.Generator().manual_seed(sum(map(ord, slot.name)))
    x = torch.randn(slot.shape, generator=g)
    leaf = slot.key.rpartition(".")[2]
    if slot.key.endswith("act.beta"):
        return torch.tensor(0.5)
    if slot.key.endswith("act.near"):
        return torch.tensor(-1e-6)
    if slot.key in ("embed.weight", "head.weight", "per_layer.embed.weight"):
        return x * 2 / math.sqrt(slot.shape[-1])
    if leaf in ("A_log", "dt_bias"):
        return 0.5 * x - 0.5
    if leaf == "scalar":
        return 1 + 0.3 * x
    if "norm" in slot.key and leaf == "weight":
        return of_norm + 0.3 * x
    return 0.3 * x if x.dim() < 2 else x * 1.2 / math.sqrt(slot.shape[-1])


def written(spec: Spec, folder: Path) -> Path:
    """A canonical folder of that Spec."""
    folder.mkdir(parents=True)
    of_norm = 0.0 if spec.norm.weight == "plus_one" else 1.0
    tensors = {n: drawn(s, of_norm) for n, s in layout(spec).items()}
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    about = {"layout_version": VERSION, "zoo_version": "0", "spec": spec.to_dict()}
    source = {
        "format": "safetensors",
        "family": "none",
        "naming": "hf",
        "prefix": [],
        "config": {},
        "n_ranks": 1,
    }
    (folder / "zoo.json").write_text(
        json.dumps(about | {"quant": {}, "source": source, "extras": {}, "carried": []})
    )
    return folder


# --- what they are asked --------------------------------------------------------------------------------------


def text(model: Decoder) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(model.spec.vocab_size, (2, LENGTH), generator=g)


def answers(model: Decoder) -> dict[str, Tensor]:
    """Logits of a text at once, and of the end of it token by token."""
    ids = text(model)
    cache = model.cache(2, LENGTH)
    cached = [model(ids[:, :GIVEN], cache), *(model(ids[:, t : t + 1], cache) for t in range(GIVEN, LENGTH))]
    return {"logits": model(ids), "cached": torch.cat(cached, 1)}


def nudged(model: Decoder, times: int = 4) -> float:
    """How far the answers move where what each layer gives is off by up to two units in the last place: the most of so many."""
    g, plain, hooks = torch.Generator().manual_seed(0), answers(model), []

    def nudge(_layer: object, _args: object, out: Tensor) -> Tensor:
        return out * (1 + 2.0**-23 * torch.randint(-2, 3, out.shape, generator=g))

    for layer in model.layers:
        hooks.append(layer.register_forward_hook(nudge))
    off = [answers(model) for _ in range(times)]
    for hook in hooks:
        hook.remove()
    return max(float((x[k] - plain[k]).abs().max()) for x in off for k in plain)


class Files(Lanes):
    """Lanes by which ranks write into each other's files, in place of GPUs' memory."""

    def __init__(self, group: dist.ProcessGroup, work: Path) -> None:
        self.stem = f"{work}/lane-{dist.get_process_group_ranks(group)}"
        super().__init__(group, torch.device("cpu"))

    def shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        self.files = getattr(self, "files", 0) + 1
        name, nbytes = f"{self.stem}-{self.files}", math.prod(shape) * dtype.itemsize
        Path(f"{name}-{self.rank}").write_bytes(bytes(nbytes))
        dist.barrier(self.group)
        raw = (torch.from_file(f"{name}-{r}", True, nbytes, dtype=torch.uint8) for r in range(self.ranks))
        return [x.view(dtype).view(shape) for x in raw]

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def arrived(self, kind: int) -> None:
        flags = self.flags[self.rank][kind]
        while int(flags.sum()) < self.ranks - 1:
            time.sleep(0)
        flags.zero_()


def by_rows(model: Decoder, work: Path) -> dict[str, Tensor]:
    """What `answers` says where passes go by rows, as if they were captured, and few tokens are enough for that."""
    assert model.across is not None
    model.across.lanes = Files(model.across.group, work)
    sizes, rows.LEAST, across.LEAST, rows.WIDE = (rows.LEAST, rows.WIDE), 2, 2, 8
    with model.across.to_be_captured():
        found = answers(model)
        uneven = model(text(model)[:, : LENGTH - 1])  # of 46 rows the last of 4 ranks has fewer
    found["logits"] = torch.cat((uneven, found["logits"][:, LENGTH - 1 :]), 1)
    (rows.LEAST, rows.WIDE), across.LEAST = sizes, sizes[0]
    assert model.across.lanes.files > 3  # places were made
    return found


def asked(mesh: DeviceMesh, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = f"{mesh.size()}-{mesh.get_local_rank()}"
    for zoo_json in sorted([*work.glob("*/zoo.json"), *work.glob(f"*/{own}/zoo.json")]):
        folder = work / zoo_json.relative_to(work).parts[0]
        model = zoo.load(zoo_json.parent, mesh=mesh)
        held = {n: p.nbytes for n, p in (*model.named_parameters(), *model.named_buffers())}
        found[folder.name] = {**answers(model), "held": held}
        if model.by_rows:
            found[f"{folder.name}, by rows"] = by_rows(model, work)
    return found


def answer(number: int, ranks: int, work: Path) -> int:
    dist.init_process_group(
        "gloo", init_method=f"file://{work}/meeting-{ranks}", rank=number, world_size=ranks
    )
    meshes = {ranks: init_device_mesh("cpu", (ranks,))}
    if ranks == 4:
        meshes[2] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("runs", "model"))["model"]
    for n, mesh in meshes.items():
        torch.save(asked(mesh, work), work / f"answers-{n}-{number}.pt")
    dist.destroy_process_group()
    return 0


def command(number: int, port: int, line: list[str], out: Path) -> int:
    from zoo.cli import cli
    from zoo.cli._common import run

    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for file, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{out}.{file}", os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(out.parent / f"of-{number}")
    code = run(cli, line)
    Path(f"{out}.code").write_text(str(code))
    return code


def together(ranks: int, do: Callable[[int], int]) -> bool:
    """Have so many forks do it. One that fails ends the others, as torchrun does; whether none did."""
    children = {}
    for number in range(ranks):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = do(number)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children[child] = number
    good = True
    while children:
        child, status = os.wait()
        del children[child]
        if status and good:
            good = False
            deadline = time.monotonic() + 20  # for those that end by themselves
            while children and time.monotonic() < deadline:
                child, _ = os.waitpid(-1, os.WNOHANG)
                children.pop(child, None)
                time.sleep(0.02)
            for child in children:
                os.kill(child, signal.SIGKILL)
    return good


def main(work: Path, *jobs: str) -> int:
    torch.set_num_threads(1)
    for job in jobs:
        if job == "commands":
            run_commands(work)
        elif not together(int(job), lambda number, n=int(job): answer(number, n, work)):  # type: ignore[misc]
            return 1
    return 0


def run_commands(work: Path) -> None:
    for n, line in enumerate(json.loads((work / "commands.json").read_text())):
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # as torchrun's agent has one
        port, out = store.port, work / str(n)
        together(
            2,
            lambda r, line=line, port=port, out=out: command(r, port, line, out.with_name(f"{out.name}-{r}")),
        )  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
