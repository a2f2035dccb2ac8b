"""Build hook of the package: compiles the native library where there is a compiler (see openglm/ops/build.py)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        module = runpy.run_path(str(Path(self.root) / "openglm" / "ops" / "build.py"))
        if module["build"]() is not None:
            build_data["artifacts"].append("openglm/ops/_native.*")
            build_data["pure_python"], build_data["infer_tag"] = False, True
