"""Commands that look at an adapter, or at the installation."""

from __future__ import annotations

from typing import Any

from hyperadapt_cli.arguments import Adapter, Output, Revision, Tasks
from hyperadapt_cli.output import Json, quiet_output, show, table


def diagnose(adapter: Adapter, task: Tasks = None, revision: Revision = None, as_json: Json = False) -> None:
    """Tell whether the tasks' adapters differ, or the hypernetwork ignores its task, without loading the base model."""
    with quiet_output(f"reading {adapter}"):
        from hyperadapt.diagnosis import diagnose as diagnose_network
        from hyperadapt.loras.generator import LoraGenerator

        diagnosis = diagnose_network(LoraGenerator.from_pretrained(adapter, revision=revision).network, task)
    saturation = diagnosis.saturation
    result = {
        "tasks": list(diagnosis.tasks),
        "share": diagnosis.share,
        "is_collapsed": diagnosis.is_collapsed,
        "is_zero": diagnosis.is_zero,
        "task_norms": diagnosis.task_norms.tolist(),
        "cosines": diagnosis.cosines.tolist(),
        "saturated_share": saturation and saturation.share,
        "saturated_layers": saturation and saturation.layers,
        "position_shares": dict(zip(diagnosis.positions, diagnosis.position_shares.tolist(), strict=True)),
    }
    show(result, str(diagnosis), as_json)


def plot(
    adapter: Adapter,
    output: Output,
    task: Tasks = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Draw the adapter, without loading the base model, as PNG and SVG.

    The pictures show the tasks' map, singular values, norms, cosines and the course of training.
    """
    with quiet_output(f"drawing {adapter}"):
        from hyperadapt.loras.generator import LoraGenerator
        from hyperadapt.plots import plot as plot_network
        from hyperadapt.runs.folder import find_folder
        from hyperadapt.runs.record import RECORD, Record

        folder = find_folder(adapter, revision, None)
        record = Record.load(folder) if (folder / RECORD).exists() else Record({}, {}, [])
        network = LoraGenerator.from_pretrained(folder).network
        paths = plot_network(
            network, output, tasks=task, log_history=record.log_history, chosen_by=record.training.get("chosen_by")
        )
    show({"files": [str(path) for path in paths]}, "\n".join(map(str, paths)), as_json)


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, the kernels in use, and what is missing."""
    with quiet_output():
        from hyperadapt_cli.doctor import report

        result = report()
    show(result, _doctor_text(result), as_json)


def _doctor_text(result: dict[str, Any]) -> str:
    devices = [f"{device['device']}: {device['name']}" for device in result["devices"]]
    hub = result["hub"]
    lines = [
        table([["package", "version"], *([name, value or "-"] for name, value in result["versions"].items())]),
        "",
        *devices,
        f"Gram matrices by {result['kernels']['used']}: {result['kernels']['reason']}",
        f"Hub: {hub['endpoint']}, {'with' if hub['token'] else 'without'} a token{', offline' * hub['offline']}",
        *(f"without {name}: no {entry['without']} ({entry['remedy']})" for name, entry in result["missing"].items()),
    ]
    return "\n".join(lines)
