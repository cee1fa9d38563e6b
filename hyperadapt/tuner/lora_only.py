"""What PEFT's LoRA model offers and this one does not, and what to do instead."""

LORA_ONLY = {
    "add_weighted_adapter": (
        "A hyperadapter has no add_weighted_adapter, since one adapter serves many tasks: add a task between others "
        "with interpolate_tasks(name, {task: weight}). To combine whole adapters, write their tasks as LoRAs with "
        "export_lora."
    ),
    "subtract_mutated_init": (
        "A hyperadapter has no subtract_mutated_init, since it leaves the base weights as they are: save it with "
        "save_pretrained, or a task of it as a LoRA with export_lora."
    ),
}
