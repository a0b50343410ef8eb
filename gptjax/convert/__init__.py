"""Models in from elsewhere, and out again (docs/huggingface.md)."""

from gptjax.convert.base import Base, check_base, check_teacher
from gptjax.convert.export import export_adapter, export_model, import_model
from gptjax.convert.models import initial_model, load, open_model, read_base, read_teacher, teacher_config

__all__ = [
    "Base",
    "check_base",
    "check_teacher",
    "export_adapter",
    "export_model",
    "import_model",
    "initial_model",
    "load",
    "open_model",
    "read_base",
    "read_teacher",
    "teacher_config",
]
