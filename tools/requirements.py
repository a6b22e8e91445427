"""Prints what .venv needs, one requirement a line: the runtime dependencies and the `dev` extra."""

import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")
