"""The page of speed: sections of measurements, kept by device beside it, and the page that is written from all of them.

    docs/results/speed.md                    the page
    docs/results/speed/DEVICE/SECTION.json   rows, ceilings, torch, commit; and SECTION.png

A device's folder is written by that device alone, so another one adds to the page and overwrites nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from transformer_vq.bench import device
from transformer_vq.bench.comparison import absent, cells
from transformer_vq.bench.plot import picture
from transformer_vq.bench.targets import TARGETS, Found
from transformer_vq.files import read_text, write_text

SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"lengths": (2048, 8192, 16_384), "repeats": 5}),
    "attention-long": ("attention", {"lengths": (32_768, 65_536), "repeats": 3}),
    "train": ("train", {"lengths": (512, 4096, 8192), "repeats": 9}),
    "compiled": ("train", {"lengths": (512, 4096), "repeats": 9, "compiled": True}),
    "generation": ("generation", {"positions": (1024, 16_384), "repeats": 100}),
    "quantize": ("quantize", {}),
    "images": ("images", {}),
}
"""By section: its benchmark and options, so that each takes at most about five minutes on two cores."""
ON_GPU: dict[str, dict[str, Any]] = {
    "attention-long": {"lengths": (262_144, 524_288), "compare_up_to": 0},
    "train": {"repeats": 5},
    "compiled": {"lengths": (2048, 8192), "repeats": 5},
}
"""Beside what the benchmark's own ON_GPU says."""
COMMAND = "transformer-vq bench all --page docs/results/speed.md"

TITLES = {
    "attention": "Attention",
    "attention-long": "Attention, longer",
    "train": "Training",
    "compiled": "Training, compiled",
    "generation": "Generation",
    "quantize": "Quantizer",
    "images": "Images",
}


def folder(page: Path) -> Path:
    """Of this device's numbers."""
    facts = device.about()
    threads = "" if facts["kind"] == "cuda" else f"-{facts['threads']}-threads"
    return page.with_suffix("") / (re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") + threads)


def missing(page: Path) -> list[str]:
    """Sections of this device that are not there yet."""
    there = _sections(folder(page))
    return [name for name in SECTIONS if name not in there]


def _sections(folder: Path) -> dict[str, Found]:
    """Measured on a device, but for what was kept in another form before 0.2."""
    found = {file.stem: json.loads(read_text(file)) for file in folder.glob("*.json")}
    return {name: one for name, one in found.items() if all("others" in row for row in one["rows"])}


def on_gpu(module: Any) -> dict[str, Any]:
    """The options of a benchmark that fit a GPU rather than a CPU."""
    return getattr(module, "ON_GPU", {})


def record(page: Path, section: str) -> None:
    """Measure one section on this device, and keep it."""
    benchmark, options = SECTIONS[section]
    facts = device.about()
    module = import_module(f"transformer_vq.bench.{benchmark}")
    if facts["kind"] == "cuda":
        options = options | on_gpu(module) | ON_GPU.get(section, {})
    rows = module.run(**options)
    ceilings = device.ceilings(device.type_of(options, module.TYPE))
    target = folder(page)
    target.mkdir(parents=True, exist_ok=True)
    found = {"bench": benchmark, "options": options, **facts, "ceilings": ceilings._asdict(), "rows": rows}
    if len(rows) > 1:
        picture(module, rows, ceilings, target / f"{section}.png", f"{TITLES[section]}: {facts['device']}")
    write_text(target / f"{section}.json", json.dumps(found, indent=1) + "\n")


def write_page(page: Path) -> None:
    """From everything that lies beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    folders = sorted(path for path in page.with_suffix("").glob("*") if any(path.glob("*.json")))
    devices = {path: found for path in folders if (found := _sections(path))}
    write_text(page, "\n".join(_page(page, devices)) + "\n")


def _page(page: Path, devices: Mapping[Path, Mapping[str, Found]]) -> list[str]:
    text = [
        "# Speed",
        "",
        "Medians and quartiles of runs that take turns in one process; × ours is how many times as long as ours a side",
        "takes, turn by turn. This page is written by one command, which measures the device that it runs on and",
        "leaves the sections of others alone:",
        "",
        f"```bash\n{COMMAND}\n```",
        "",
        "How to run and read it: [benchmarks](../how-to/benchmarks.md).",
        "",
        "## Targets",
        "",
    ]
    kinds = {path: next(iter(found.values()))["kind"] for path, found in devices.items()}
    for kind, name in (("cpu", "CPU"), ("cuda", "GPU")):
        ours = [path for path in devices if kinds[path] == kind]
        text += [f"### {name}", "", *_targets(kind, [devices[path] for path in ours]), ""]
        if not ours:
            text += ["Not measured yet; on a machine with such a device, the command above fills the column.", ""]
    for path, found in devices.items():
        text += _device(page, path, found)
    return text


def _targets(kind: str, devices: list[Mapping[str, Found]]) -> list[str]:
    names = [_name(next(iter(found.values()))) for found in devices] or ["measured"]
    out = [f"| | wanted | {' | '.join(names)} |", f"|---|--:|{'--:|' * len(names)}"]
    for what, section, wanted, find in TARGETS[kind]:
        values = [find(found[section]) if section in found else None for found in devices] or [None]
        out.append(f"| {what} | {wanted} | {' | '.join('' if v is None else f'{v:.2f}' for v in values)} |")
    return out


def _name(found: Found) -> str:
    return str(found["device"]) + ("" if found["kind"] == "cuda" else f", {found['threads']} threads")


def _device(page: Path, path: Path, sections: Mapping[str, Found]) -> list[str]:
    first = next(iter(sections.values()))
    text = [f"## {_name(first)}", ""]
    for name in SECTIONS:
        if name not in sections:
            continue
        found, place = sections[name], path.relative_to(page.parent).as_posix()
        text += [f"### {TITLES[name]}", "", *_rows(found), ""]
        if away := absent(found["rows"]):
            text += [*(f"- {other}: absent, {why}" for other, why in sorted(away.items())), ""]
        if (path / f"{name}.png").is_file():
            text += [f"![{TITLES[name]}: time over size, log-log, above the roofline]({place}/{name}.png)", ""]
        roof = found["ceilings"]
        ceilings = f"{roof['flops'] / 1e9:,.0f} GFLOP/s and {roof['bandwidth'] / 1e9:,.1f} GB/s"
        text += [
            f"`transformer-vq bench {found['bench']}` with {_options(found['options'])}; torch {found['torch']}, "
            f"commit `{found['commit']}`; ceilings {ceilings}. [Numbers]({place}/{name}.json)",
            "",
        ]
    return text


def _rows(found: Found) -> list[str]:
    module = import_module(f"transformer_vq.bench.{found['bench']}")
    headings, lines = cells(found["rows"], module.AXIS, module.MORE)
    return [f"| {' | '.join(line)} |" for line in (headings, ("--:",) * len(headings), *lines)]


def _options(options: Found) -> str:
    numbers = {k: v if isinstance(v, list) else [v] for k, v in options.items() if not isinstance(v, bool)}

    def shown(x: Any) -> str:
        return x if isinstance(x, str) else f"{x:,}"

    words = [f"{key.replace('_', ' ')} {', '.join(map(shown, found))}" for key, found in numbers.items()]
    return "; ".join(words + [key for key, value in options.items() if value is True]) or "its defaults"
