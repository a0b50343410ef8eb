"""Models in from elsewhere, and out again (docs/huggingface.md)."""

from gptjax.convert.export import export_model, import_model
from gptjax.convert.models import initial_model, load, open_model

__all__ = ["export_model", "import_model", "initial_model", "load", "open_model"]
