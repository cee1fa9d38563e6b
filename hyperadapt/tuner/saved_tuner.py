"""How PEFT saves and loads the tensors of a hyperadapter."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hyperadapt.hypernetwork.sharding import make_whole
from hyperadapt.tuner.loading import check_left_out, checked_state_dict


class SavedTuner(BaseTuner):
    """A tuner whose tensors are whole when they are saved, and checked when they are loaded."""

    prefix = "hyperadapter_"

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *, state_dict: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        make_whole(state_dict, (cls.prefix, ".modules_to_save."))
        return super()._get_adapter_state_dict(model, state_dict=state_dict, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_state_dict(model, adapter_name, state_dict, renamed)

    def _load_from_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        check_left_out(self, state_dict)
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f"hyperadapter_networks.{adapter_name}."
        if marker in key:
            return key.replace(marker, "hyperadapter_networks.", 1)
        return str(super()._remove_adapter_name_from_key(key, adapter_name))
