"""What is trained: data, model and evaluation of each `config.task`.

| task               | data                    | model                | module                |
|--------------------|-------------------------|----------------------|-----------------------|
| language_modelling | a corpus                | models/decoder.py    | language_modelling.py |
| classification     | texts and their labels  | models/classifier.py | classification.py     |
"""

from moe_dist.config import Config
from moe_dist.train.tasks.classification import Classification
from moe_dist.train.tasks.language_modelling import LanguageModelling
from moe_dist.train.tasks.task import Task


def make_task(config: Config) -> Task:
    """Reads the data. Raises ValueError when it cannot be used."""
    return Classification(config) if config.task == "classification" else LanguageModelling(config)
