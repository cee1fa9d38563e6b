"""The adapter's card, as a trainer knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hyperadapt.cards.card import may_be_written_anew, write_card
from hyperadapt.cards.trainer_state import last_results, training_facts
from hyperadapt.hypernetwork.saturation import Saturation
from hyperadapt.trainer.datasets import majority_of
from hyperadapt.trainer.rows import RowTasksMixin


class TrainerCardMixin(RowTasksMixin):
    """Has ``Trainer``, or a subclass of it, write the adapter's card in place of its own."""

    _saturation: Saturation | None = None
    # How much had been logged when the best weights were loaded.
    _logged_before_best: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the other trainer does; what is measured next is of other weights than the best ones."""
        self._logged_before_best = None
        return super().train(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._logged_before_best = len(self.state.log_history)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter's card into the output folder, with what the last evaluation of each task gave."""
        if not self.is_world_process_zero():
            return
        folder = str(self.args.output_dir)
        write_card(
            self.accelerator.unwrap_model(self._model),
            folder,
            overwrite=may_be_written_anew(folder),
            title=model_name,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else list(tags or ()),
            results=self._results(),
            split="validation",
            saturation=self._saturation,
            training={
                **training_facts(vars(self.state)),
                "batch_size": self.args.train_batch_size * self.args.world_size,
                "learning_rate": self.args.learning_rate,
                "seed": self.args.seed,
            },
        )

    def _results(self) -> dict[str, dict[str, float]]:
        """Of each task what was last measured, with what its most frequent label would reach beside an accuracy."""
        history, count = self.state.log_history, self._logged_before_best
        if count is not None:
            # Of what was measured before, only what the best weights gave.
            best = self.state.best_global_step
            history = [one for one in history[:count] if one.get("step") == best] + history[count:]
        results = last_results(history, self.task_names)
        data = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
        for task, values in results.items():
            share = majority_of(data[task]) if task in data and "accuracy" in values else None
            if share is not None:
                values["majority"] = share
        return results
