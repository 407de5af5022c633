"""nanoGPT's model, loaded from a checkout of nanoGPT."""

import runpy
import sys
from types import SimpleNamespace
from typing import Any


def load_model_module(folder: str) -> Any:
    """Run `folder`/model.py by its path, not by its name, because quill has a module `model` too. → its names"""
    sys.path.append(folder)  # a fork's model.py may import other files of its folder
    return SimpleNamespace(**runpy.run_path(f"{folder}/model.py"))
