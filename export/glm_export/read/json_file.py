"""Owns reading JSON objects: the error of one that is none names the file, in JSON's words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from glm_export.error import ExportError

if TYPE_CHECKING:
    from pathlib import Path


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise ExportError(f"{path}: not JSON: not text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise ExportError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object")
    return value
