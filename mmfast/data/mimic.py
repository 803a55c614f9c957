"""MIMIC-IV: hospital stays with codes, laboratory values and notes, for users who have access to it."""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from mmfast.data.files import find, folders
from mmfast.data.samples import Samples, Split, standardised
from mmfast.data.table import DataError

TASKS = {"mortality": "MIMIC-IV", "readmission": "MIMIC-IV-readmission"}  # with the names of the sets
TABLES = ("patients", "admissions", "diagnoses_icd", "procedures_icd", "prescriptions", "labevents", "d_labitems")
NOTES = "MIMIC-IV/note/discharge.csv"
MOST_DAYS, AGES = 10, range(18, 90)
DEATH_DAYS, RETURN_DAYS = 90, 15
CODES, WORDS = 1000, 1000  # the most frequent of the training rows
# one is in an item's label
LABS = ("Hematocrit", "Platelet", "WBC", "Bilirubin", "pH", "Bicarbonate", "Creatinine", "Lactate", "Potassium", "Sodium")
_COURSE = re.compile(r"Brief Hospital Course:(.*?)Medications on Admission:", re.DOTALL)

Bags = dict[str, set[str]]  # by stay


@dataclass(frozen=True)
class Stay:
    """A stay in hospital; the labels are None where it is not known."""

    patient: str
    discharged: str  # as the tables write it, so that later times are greater
    mortality: bool | None
    readmission: bool | None


def load(seed: int, task: str = "mortality") -> Split:
    """MIMIC-IV as MUSE (Wu et al., ICLR 2024) chooses and labels its stays, with plainer features.

    As there: stays of at most 10 days, age 18 to 89, left alive. Days are whole ones. Mortality is death within 90 days after discharge; one who has no date of death but came
    back after 90 days lived, of others it is not known. Readmission is a next stay that begins within 15 days; where there is none it is not known. Stays
    without a known label are left out. Codes are there of every stay, notes and laboratory values of some.

    Not as there: all is in vectors instead of BERT, a transformer over codes and a GRU over time, so MUSE's numbers are not to be expected. Age, gender
    and ethnicity are no features. Stays of one patient are on one side of the split; MUSE splits stays.

    Args:
        seed: of the split of the patients, 70 / 10 / 20 %.
        task: "mortality" or "readmission".

    Returns:
        A `Split` of 2 classes on the CPU, all vocabularies and deviations from the training rows:
            "codes" [n, up to 1,000] diagnoses, procedures and drugs, 1 where the stay has them;
            "labs" [n, 2 per item, 114 in MUSE], the last value of each item before discharge, standardised (0 where there is none), and after all
            values 1 where that is flagged as abnormal;
            "notes" [n, up to 1,000] words of the section Brief Hospital Course of the discharge summary, 1 where it has them, if the table is there.
        Reading the 120 million rows of `labevents` takes minutes.

    Raises:
        DataError: a table is missing, or is not as it should be.
        ValueError: `task` is neither.

    Example:
        >>> split = load(seed=0, task="readmission")  # doctest: +SKIP
        >>> split.train.inputs["labs"].shape[1]  # doctest: +SKIP
        114
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    kept = {name: stay for name, stay in stays().items() if getattr(stay, task) is not None}
    parts = _by_patient(kept, seed)
    labs, there = _labs(kept, parts[0])
    inputs = {"codes": _vectors(kept, _codes(kept), parts[0], CODES), "labs": labs}
    present = {"codes": torch.ones(len(kept), dtype=torch.bool), "labs": there}
    if _path(NOTES):
        notes = _notes(kept)
        inputs["notes"] = _vectors(kept, notes, parts[0], WORDS)
        present["notes"] = torch.tensor([name in notes for name in kept])
    rows = Samples(inputs, present, torch.tensor([int(getattr(stay, task)) for stay in kept.values()]))
    train, valid, test = (rows.part(index) for index in parts)
    return Split(train, valid, test, 2, TASKS[task])


def stays() -> dict[str, Stay]:
    """Those that are not excluded, see `load`, by number.

    Raises:
        DataError: a table is missing, or is not as it should be.
    """
    _check()
    patients = {
        subject: (_number(age) - _number(year), died)
        for subject, age, year, died in _rows("patients", "subject_id", "anchor_age", "anchor_year", "dod")
    }
    of: dict[str, list[tuple[datetime, datetime, str, str]]] = {}
    for subject, stay, start, end, expired in _rows(
        "admissions", "subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag"
    ):
        of.setdefault(subject, []).append((_time(start), _time(end), stay, expired))
    found = {}
    for subject, all_stays in of.items():
        if subject not in patients:
            raise DataError(f"the patient {subject} of admissions is not in patients")
        older, died = patients[subject]
        all_stays.sort()
        for i, (admitted, discharged, stay, expired) in enumerate(all_stays):
            if expired != "0" or (discharged - admitted).total_seconds() > MOST_DAYS * 86400 or admitted.year + older not in AGES:
                continue
            days = (all_stays[i + 1][0] - discharged).days if i + 1 < len(all_stays) else None
            mortality = None
            if died:
                mortality = (_time(died) - discharged).days <= DEATH_DAYS
            elif days is not None and days > DEATH_DAYS:
                mortality = False
            found[stay] = Stay(subject, str(discharged), mortality, None if days is None else days <= RETURN_DAYS)
    return found


def _by_patient(kept: Mapping[str, Stay], seed: int) -> list[Tensor]:
    """Places of the stays of 70, 10 and 20 % of the patients, in random order: a batch that holds all stays of a patient would tell of them to systems that see
    batches."""
    patients = list(dict.fromkeys(stay.patient for stay in kept.values()))
    n = len(patients)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).tolist()
    ends = (round(0.7 * n), round(0.8 * n))
    if not 0 < ends[0] < ends[1] < n:
        raise DataError(f"MIMIC-IV has {n} patients with a known label, too few for a training, a validation and a test part")
    part = {patients[p]: sum(i >= end for end in ends) for i, p in enumerate(order)}
    of = torch.tensor([part[stay.patient] for stay in kept.values()])
    mixed = torch.randperm(len(of), generator=generator)
    return [mixed[of[mixed] == i] for i in range(3)]


def _codes(kept: Mapping[str, Stay]) -> Bags:
    """Diagnoses, and what was done and given until discharge."""
    bags: Bags = {name: set() for name in kept}
    for name, version, code in _rows("diagnoses_icd", "hadm_id", "icd_version", "icd_code"):
        if name in bags:
            bags[name].add(f"diagnosis {version} {code}")
    for name, version, code, day in _rows("procedures_icd", "hadm_id", "icd_version", "icd_code", "chartdate"):
        if name in bags and day <= kept[name].discharged:
            bags[name].add(f"procedure {version} {code}")
    for name, drug, start in _rows("prescriptions", "hadm_id", "drug", "starttime"):
        if name in bags and drug and start and start <= kept[name].discharged:
            bags[name].add(f"drug {drug.lower()}")
    return bags


def _notes(kept: Mapping[str, Stay]) -> Bags:
    bags = {}
    for name, text in _rows(NOTES, "hadm_id", "text"):
        course = _COURSE.search(text) if name in kept else None
        if course:
            bags[name] = set(re.findall("[a-z]{3,}", course[1].lower()))
    return bags


def _vectors(kept: Mapping[str, Stay], bags: Bags, train: Tensor, most: int) -> Tensor:
    """float32 [stays, words], 1 where a stay has the word; the words of most training stays, ties by the alphabet."""
    names = list(kept)
    count = Counter(word for i in train.tolist() for word in bags.get(names[i], ()))
    place = {word: i for i, word in enumerate(sorted(count, key=lambda word: (-count[word], word))[:most])}
    x = torch.zeros(len(names), len(place))
    for i, name in enumerate(names):
        x[i, [place[word] for word in bags.get(name, ()) if word in place]] = 1
    return x


def _labs(kept: Mapping[str, Stay], train: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [stays, 2 items], and bool [stays], whether there is any value."""
    items = {item for item, label in _rows("d_labitems", "itemid", "label") if any(lab in label for lab in LABS)}
    last: dict[tuple[str, str], tuple[str, float, float]] = {}
    for name, item, time, number, abnormal in _rows("labevents", "hadm_id", "itemid", "storetime", "valuenum", "flag"):
        if item in items and name in kept and number and time and time <= kept[name].discharged:
            before = last.get((name, item))
            if before is None or time >= before[0]:
                last[name, item] = time, _number(number), float(abnormal == "abnormal")
    names = list(kept)
    row = {name: i for i, name in enumerate(names)}
    in_train = {names[i] for i in train.tolist()}
    column = {item: i for i, item in enumerate(sorted({item for name, item in last if name in in_train}))}
    x, flags = torch.full((len(kept), len(column)), torch.nan, dtype=torch.float64), torch.zeros(len(kept), len(column))
    for (name, item), (_, value, flag) in last.items():
        if item in column:
            x[row[name], column[item]], flags[row[name], column[item]] = value, flag
    for j in range(len(column)):
        seen = (~x[train, j].isnan()).nonzero().squeeze(1)
        x[:, j : j + 1] = standardised(x[:, j : j + 1], train[seen])
    return torch.cat([x.nan_to_num(0.0).float(), flags], 1), ~x.isnan().all(1)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"MIMIC-IV has the time {text!r}, expected one such as 2180-05-06 22:23:00") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"MIMIC-IV has {text!r} where a number is expected") from None


def _path(file: str) -> Path | None:
    """Where a table is, packed or not."""
    return find(file) or find(f"{file}.gz")


def _file(table: str) -> str:
    return table if "/" in table else f"MIMIC-IV/hosp/{table}.csv"


def _check() -> None:
    missing = [_file(table) for table in TABLES if _path(_file(table)) is None]
    if missing:
        raise DataError(
            f"MIMIC-IV is not here: there is no {', '.join(missing)}, each with or without .gz, in {' or '.join(map(str, folders()))}. PhysioNet gives it "
            "to users with credentials, https://physionet.org/content/mimiciv/ (2.0 in MUSE); the notes, which may be left out, are the table "
            f"discharge of https://physionet.org/content/mimic-iv-note/, here {NOTES}. Put them there, or name the folder in MMFAST_DATA"
        )


def _rows(table: str, *columns: str) -> Iterator[list[str]]:
    """Some cells of each row."""
    path = _path(_file(table))
    assert path
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8", newline="") as text:
            lines = csv.reader(text)
            head = next(lines, [])
            if not set(columns) <= set(head):
                raise DataError(f"{path} has the columns {', '.join(head)}, expected {', '.join(columns)} among them")
            places = [head.index(column) for column in columns]
            for cells in lines:
                yield [cells[i] for i in places]
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
