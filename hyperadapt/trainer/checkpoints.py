"""Trainer's checkpoints, complete or absent whenever the process dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hyperadapt.cards.card import CARD
from hyperadapt.files import UNFINISHED

# No name that is taken for a checkpoint's; the same in all processes.
_UNFINISHED = f"{UNFINISHED}checkpoint"


class WholeCheckpointsMixin(Trainer):
    """Has ``Trainer``, or a subclass of it, give a checkpoint its name only when it is finished.

    Trainer writes into ``checkpoint-<step>`` itself, so that a run that dies there leaves a folder that
    ``resume_from_checkpoint=True`` takes for a checkpoint. Here it writes elsewhere in the output folder; likewise old
    checkpoints lose their names before they are deleted. The last step of a run with ``save_total_limit=1`` and
    ``load_best_model_at_end`` is still Trainer's own: it deletes what is not the best in place.
    """

    _saving = False

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, _UNFINISHED) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        unfinished, checkpoint = folder / _UNFINISHED, folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        # Trainer looks for it where it writes; and a run that is resumed may have been moved.
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best == checkpoint or best.exists():
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = unfinished / checkpoint.name
            self.state.save_to_json(str(written / "trainer_state.json"))
            _name_finished(written / CARD)
            for old in [checkpoint, *self._superfluous(folder, checkpoint)]:
                if old.exists():
                    old.rename(unfinished / f"deleted-{old.name}")
            written.rename(checkpoint)
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _superfluous(self, folder: Path, new: Path) -> list[Path]:
        """Checkpoints to delete, as ``save_total_limit`` says: the oldest, but never the best."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return []
        best = self.state.best_model_checkpoint
        kept = {new} if best is None else {new, Path(best)}
        others = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path not in kept]
        others.sort(key=lambda path: int(path.name[11:]))
        times = [path.stat().st_mtime for path in others]
        # As in transformers: copies and some file systems have all made at once.
        if times and max(times) - min(times) >= 1:
            others.sort(key=lambda path: path.stat().st_mtime)
        return others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]


def _name_finished(card: Path) -> None:
    """Let a card, if there is one, say to load the adapter from where it will be."""
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(f"{_UNFINISHED}{os.sep}", ""), encoding="utf-8")
