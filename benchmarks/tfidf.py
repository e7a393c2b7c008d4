"""TF-IDF and logistic regression (scikit-learn) on the texts and splits that the classifier trains on.

python benchmarks/tfidf.py [CONFIG] [flags of moe-dist train]     default: configs/classifier.yaml

The regularisation is chosen on the validation split, the test split is looked at once. Words are those of scikit-learn
by default, then also single characters that are no letters, as the classifier sees them.
"""

import sys
import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from moe_dist.config.load import load_config
from moe_dist.data.labelled import read_examples, split, unique

WORDS = {"words": r"(?u)\b\w\w+\b", "words and signs": r"\w+|[^\w\s]"}


def main(args: list[str]) -> None:
    path, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else ("configs/classifier.yaml", args)
    data = load_config(path, flags).data
    parts = split(unique(list(read_examples(data))), data.validation_fraction, data.test_fraction)
    texts = {name: [example.text for example in part] for name, part in parts.items()}
    labels = {name: [example.label for example in part] for name, part in parts.items()}
    print(", ".join(f"{len(part)} {name}" for name, part in texts.items()))
    for name, pattern in WORDS.items():
        began = time.monotonic()
        vectorizer = TfidfVectorizer(token_pattern=pattern, sublinear_tf=True)
        train = vectorizer.fit_transform(texts["train"])
        validation, test = (vectorizer.transform(texts[part]) for part in ("validation", "test"))
        models = [LogisticRegression(C=c, max_iter=1000).fit(train, labels["train"]) for c in (1.0, 10.0, 100.0)]
        best = max(models, key=lambda model: model.score(validation, labels["validation"]))
        guess = best.predict(test)
        right, f1 = accuracy_score(labels["test"], guess), f1_score(labels["test"], guess, average="macro")
        seconds = time.monotonic() - began
        print(f"TF-IDF of {name}, C={best.C:g}: test accuracy {right:.2%}, macro-F1 {f1:.4f}, {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
