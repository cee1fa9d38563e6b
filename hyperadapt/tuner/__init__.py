"""The method of PEFT: the model, its layers, and their files."""
