"""Embedding models with a task for each text. Importing this imports sentence-transformers."""

try:
    import sentence_transformers
    from sentence_transformers.base.modules import Module
except ImportError as error:
    raise ImportError(
        f"hyperadapt.sentence_transformers needs sentence-transformers 6.2 or newer, which could not be imported "
        f"({error}). Install it: pip install 'hyperadapt[text]'."
    ) from error
if not hasattr(Module, "on_model_ready"):
    raise ImportError(
        f"hyperadapt.sentence_transformers needs sentence-transformers 6.2 or newer, but "
        f"{sentence_transformers.__version__} is installed. Upgrade it: pip install -U 'hyperadapt[text]'."
    )

from hyperadapt.sentence_transformers.adapting import add_hyperadapter
from hyperadapt.sentence_transformers.exporting import export_sentence_transformer
from hyperadapt.sentence_transformers.trainer import MultiTaskSentenceTransformerTrainer
from hyperadapt.sentence_transformers.transformer import HyperAdapterTransformer

__all__ = [
    "HyperAdapterTransformer",
    "MultiTaskSentenceTransformerTrainer",
    "add_hyperadapter",
    "export_sentence_transformer",
]

# What folders call the class, which the user of this package has imported, so that no trust is asked for.
_MODULES = {f"{__name__}.{HyperAdapterTransformer.__name__}": HyperAdapterTransformer}
_loading = sentence_transformers.SentenceTransformer
_loading._module_classes = {**getattr(_loading, "_module_classes", {}), **_MODULES}
