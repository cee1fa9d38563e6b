"""PEFT's own parametrised tests with a ``HyperAdapterConfig`` in place of PEFT's methods."""
