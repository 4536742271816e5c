"""Wrap every network of torchvision and timm, check that nothing is lost, and write down what is gated.

Each network is built with random weights (no download), with batch-norm statistics and parameters that no channel has
by accident, and checked in a process of its own:

- gates open: eval output bitwise equal to the original's, original state_dict keys in place
- random gates: every input channel predicted to be zero is exactly zero; masked and sparse form agree
- train mode with gates forced open: outputs and parameter gradients equal the original's
- unwrapped: keys, hooks, modes and outputs as before

$ python benchmarks/zoo.py --out docs/results/zoo.jsonl            # resumes; one line per network
$ python benchmarks/zoo.py --out docs/results/zoo.jsonl --report docs/coverage.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import decouplify
from decouplify.modes import eval_mode

SMALL = 96  # pixels; networks that cannot run on so small an image get their own size
MAX_GMACS = 12.0  # above this a network is inspected only, on its own size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines, one per network; finished ones are skipped"
    )
    parser.add_argument("--only", default="*", help="glob of names, such as 'timm:resnet*'")
    parser.add_argument("--per-family", type=int, default=0, help="at most so many timm networks per family; 0 for all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no network after this time")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one network")
    parser.add_argument("--report", type=Path, help="write the page instead of running anything")
    args = parser.parse_args()
    if args.report:
        args.report.write_text(page([json.loads(line) for line in args.out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    finished = {json.loads(line)["name"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    names = [n for n in all_names(args.per_family) if fnmatch.fnmatch(n, args.only) and n not in finished]
    start = time.monotonic()
    for i, name in enumerate(names):
        if time.monotonic() - start > args.seconds:
            print(f"{len(names) - i} networks left; run again to go on")
            break
        result = in_child(lambda name=name: check(name), args.timeout)
        result = {"name": name, **result}
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"[{i + 1}/{len(names)}] {name}: {summary(result)}", flush=True)


def all_names(per_family: int) -> list[str]:
    """Every network for images, torchvision first; timm round-robin over its families."""
    vision = torchvision.models.list_models(module=torchvision.models)
    vision += torchvision.models.list_models(module=torchvision.models.segmentation)
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    limit = per_family or max(map(len, families.values()))
    rounds = [models[i] for i in range(limit) for models in families.values() if i < len(models)]
    return [f"torchvision:{n}" for n in vision] + [f"timm:{n}" for n in rounds]


def in_child(work: Callable[[], dict[str, Any]], timeout: int) -> dict[str, Any]:
    """Run in a forked process: a crash or a leak of one network must not reach the next."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(timeout)
        try:
            result = work()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            result = {
                "error": f"{type(error).__name__}: {str(error)[:400]}",
                "at": f"{Path(frame.filename).name}:{frame.lineno}",
            }
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(result))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"error": f"ended by signal {os.WTERMSIG(status)} (timeout {timeout} s)"}


def check(name: str) -> dict[str, Any]:
    start = time.monotonic()
    torch.manual_seed(0)
    model = randomised(build(name)).eval()
    plan = decouplify.inspect(model, linear_as_conv="convnext" in name)
    result: dict[str, Any] = {
        "sites": len(plan.sites),
        "gates": len(plan.gates),
        "gated_share": round(plan.gated_share, 4),
        "gmacs": round(plan.n_macs / 1e9, 3),
        "conv_share": round(conv_share(plan), 4),
        "refused": Counter(r.reason for r in plan.refused),
    }
    if not plan.sites:
        return {**result, "note": "nothing to gate"}
    size, plan = smallest_size(model, plan)
    result["size"] = list(size)
    if plan.n_macs > MAX_GMACS * 1e9:
        return {**result, "note": f"inspected only: {plan.n_macs / 1e9:.0f} GMACs on the smallest size it takes"}
    result.update(check_numbers(model, size, plan))
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def conv_share(plan: decouplify.Plan) -> float:
    """Share of all multiply-accumulates that lie in convolutions (or sites)."""
    return (sum(s.n_macs for s in plan.sites) + sum(r.n_macs for r in plan.refused)) / plan.n_macs


def smallest_size(model: nn.Module, plan: decouplify.Plan) -> tuple[tuple[int, ...], decouplify.Plan]:
    """A small image size on which the network runs the same sites, else its own."""
    channels = plan.input_size[0]
    if plan.n_macs > 0.2e9:
        try:
            small = decouplify.inspect(model, (channels, SMALL, SMALL))
            if [s.name for s in small.sites] == [s.name for s in plan.sites]:
                return (channels, SMALL, SMALL), small
        except ValueError:
            pass
    return plan.input_size, plan


def check_numbers(model: nn.Module, size: tuple[int, ...], plan: decouplify.Plan) -> dict[str, Any]:
    images = torch.randn(2, *size)
    keys, state, before = list(model.state_dict()), module_state(model), outputs(model, images)
    reference = training_step(model, images)
    decouplify.wrap(model, size, linear_as_conv=plan.options.linear_as_conv)  # verifies bits and zero channels itself
    result: dict[str, Any] = {
        "eval_bitwise": same(before, outputs(model, images)),
        "keys_kept": [k for k in model.state_dict() if not k.startswith("decoupling.")] == keys,
    }
    everything_open = {g.name: torch.ones(g.n_filters) for g in plan.gates}
    with model.decoupling.forced(everything_open):
        result["train_equal"] = close(reference, training_step(model, images))
    randomise_gates(model)
    report = decouplify.verify(model, decouplify.sparsify(model), images[:1], rtol=float("inf"))
    result["sparse_error"] = report.max_error
    result["gates_far_from_threshold_differ"] = sum(layer.n_differing for layer in report.layers) - report.n_near > 0
    macs = decouplify.count_macs(model, images)
    result["mac_reduction_random_gates"] = round(macs.reduction, 3)
    decouplify.unwrap(model)
    result["unwrap_identical"] = module_state(model) == state and same(before, outputs(model, images))
    return result


def build(name: str) -> nn.Module:
    registry, _, model = name.partition(":")
    if registry == "timm":
        return timm.create_model(model)
    options: dict[str, Any] = {"weights": None}
    if model in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if model in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    return torchvision.models.get_model(model, **options)


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and gains that no channel has by accident; gains that start at zero would hide half of a network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def randomise_gates(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for controller in model.decoupling.controllers.values():
        with torch.no_grad():
            controller.fc2.bias.copy_(torch.randn(controller.fc2.bias.shape, generator=generator))


def module_state(model: nn.Module) -> Any:
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with eval_mode(model), torch.no_grad():
        return [t for t in pytree.tree_leaves(model(images)) if isinstance(t, Tensor)]


def training_step(model: nn.Module, images: Tensor) -> list[Tensor] | None:
    """Outputs and gradients of one step in train mode; None if the network cannot train on this size."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    model.train()
    try:
        leaves = [t for t in pytree.tree_leaves(model(images)) if isinstance(t, Tensor)]
        sum(t.float().sin().sum() for t in leaves).backward()
        ours = {id(p) for p in model.decoupling.parameters()} if hasattr(model, "decoupling") else set()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None and id(p) not in ours]
        return [t.detach() for t in leaves] + grads
    except (ValueError, RuntimeError):  # batch norm over a single value, or an auxiliary head over none
        return None
    finally:
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor] | None, b: list[Tensor] | None) -> bool | None:
    """Equal up to the order of sums, which the memory layout of a product may change; None if not comparable."""
    if a is None or b is None:
        return None
    return len(a) == len(b) and all(
        float((x - y).abs().max()) <= 1e-3 * float(x.abs().max()) + 1e-6 for x, y in zip(a, b, strict=True) if x.numel()
    )


def failures(result: dict[str, Any]) -> list[str]:
    """What does not hold for a network."""
    if "error" in result:
        return [result["error"]]
    found = [k for k in ("eval_bitwise", "keys_kept", "train_equal", "unwrap_identical") if result.get(k) is False]
    if result.get("sparse_error", 0.0) > 1e-5:
        found.append(f"sparse form off by {result['sparse_error']:.1e}")
    return found


def summary(result: dict[str, Any]) -> str:
    wrong = failures(result)
    if wrong:
        return "FAILED " + "; ".join(wrong)
    return f"{result['sites']} sites, {100 * result['gated_share']:.1f} % of MACs, {result.get('note', 'all equal')}"


def page(results: list[dict[str, Any]]) -> str:
    """The coverage page."""
    wrapped = [r for r in results if r.get("sites")]
    checked = [r for r in wrapped if "eval_bitwise" in r]
    pure = [r for r in wrapped if r["conv_share"] > 0.9]
    failed = [r for r in results if failures(r)]
    reasons = sum((Counter(r.get("refused", {})) for r in results), Counter())
    lines = [
        "# Coverage",
        "",
        "Which networks of torchvision and timm can be wrapped, and what was checked on each. Made by",
        "`python benchmarks/zoo.py --out docs/results/zoo.jsonl --report docs/coverage.md` from random weights;",
        "; ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (torch, torchvision, timm)) + ".",
        "",
        f"- networks run: {len(results)} of {len(all_names(0))}; with something to gate: {len(wrapped)}",
        f"- checked with numbers: {len(checked)}; inspected only, because of their size: {len(wrapped) - len(checked)}",
        f"- failures: {len(failed)}",
    ]
    if pure:
        share = sum(r["gated_share"] for r in pure) / len(pure)
        lines.append(
            f"- mean gated share over the {len(pure)} networks of convolutions (over 90 % of MACs): {100 * share:.1f} %"
        )
    if checked:
        errors = sorted(r["sparse_error"] for r in checked)
        lines.append(
            f"- relative error of the sparse form: median {errors[len(errors) // 2]:.1e}, largest {errors[-1]:.1e}"
        )
        untrained = sum(r["train_equal"] is None for r in checked)
        lines.append(f"- training step not comparable, for the image is too small for batch norm: {untrained}")
    lines += ["", "## Convolutions left alone, over all networks", "", "| reason | convolutions |", "| --- | --- |"]
    lines += [f"| {reason} | {n} |" for reason, n in merged(reasons).most_common()]
    if failed:
        lines += ["", "## Failures", "", "| network | what |", "| --- | --- |"]
        lines += [f"| {r['name']} | {'; '.join(failures(r))[:200]} |" for r in failed]
    lines += ["", "## Networks", "", "| network | GMACs | sites | gates | gated % | size checked | sparse error |"]
    lines += [
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(r) for r in sorted(wrapped, key=lambda r: r["name"])),
    ]
    return "\n".join(lines) + "\n"


def merged(reasons: Counter[str]) -> Counter[str]:
    """Counts of reasons, those that differ in a number put together."""
    found: Counter[str] = Counter()
    for reason, n in reasons.items():
        found["called several times per image" if reason.startswith("called ") else reason] += n
    return found


def row(r: dict[str, Any]) -> str:
    size = f"{r['size'][1]}" if "eval_bitwise" in r else "-"
    error = f"{r['sparse_error']:.0e}" if "sparse_error" in r else "-"
    share = f"{100 * r['gated_share']:.1f}"
    return f"| {r['name']} | {r['gmacs']:.2f} | {r['sites']} | {r['gates']} | {share} | {size} | {error} |"


if __name__ == "__main__":
    sys.exit(main())
