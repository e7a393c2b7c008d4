"""Files of a study beside its runs and its ledger: the lock of each point, and study.json, which names the study's YAML
file, so that the folder alone says how far it is. Light: no torch."""

import json
from dataclasses import replace
from pathlib import Path

from moe_dist.disk import replace_text
from moe_dist.study.design.grid import Point, Study, load_study
from moe_dist.train.record.status import STUDY


def lock_of(point: Point) -> Path:
    """Held by the runner of the point, and by the process that trains it."""
    return point.folder / "lock"


def remember(study: Study) -> None:
    """Written when points are started or handed in."""
    path, text = study.folder / STUDY, json.dumps({"study": str(study.path.absolute())}) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        study.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)


def is_study_folder(folder: Path) -> bool:
    return (folder / STUDY).is_file()


def study_of(folder: Path) -> Study:
    """The study whose points lie in `folder`, from wherever you are. Raises ValueError when its file has gone, or is
    another study's now."""
    path = Path(json.loads((folder / STUDY).read_text(encoding="utf-8"))["study"])
    if not path.is_file():
        raise ValueError(f"{folder}: its study {path} is not there any more; give the study's file instead")
    study = load_study(path)
    if study.file.name != folder.absolute().name:
        raise ValueError(f"{folder}: its study {path} is called {study.file.name} now; give the study's file instead")
    points = tuple(replace(point, folder=folder / point.name) for point in study.points)
    return replace(study, file=replace(study.file, root=str(folder.absolute().parent)), points=points)
