"""nanoGPT's model, loaded from a checkout of nanoGPT."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_model_module(folder: str) -> ModuleType:
    """Import `folder`/model.py by its path and not by its name, because quill has a module `model` too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(folder)  # a fork's model.py may import other files of its folder
    spec.loader.exec_module(module)
    return module
