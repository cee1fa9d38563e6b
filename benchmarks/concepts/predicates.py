"""Concepts that are computed from a text: what it contains, in lower case, as the base model reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

MONTHS = "january february march april may june july august september october november december"
NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty hundred thousand million billion"
COUNTRIES = (
    "america britain england france germany italy spain japan china india canada mexico brazil russia israel egypt "
    "australia ireland scotland wales poland turkey greece cuba vietnam korea iran iraq kuwait africa indonesia u.s. us"
)
COLORS = "black white red blue green yellow brown gray grey pink purple orange golden"
FAMILY = "mother father son daughter brother sister wife husband parent parents child children baby family uncle aunt"
BODY = "head eye eyes ear nose mouth tooth teeth hand foot feet arm leg heart brain skin bone blood lung liver kidney"
TIMES = "second seconds minute minutes hour hours day days week weeks month months year years decade century"
MONEY = "dollar dollars dlr dlrs cent cents cts pound pounds yen money euro euros price prices cost costs"
SCIENCE = "acid protein cell cells gene enzyme virus bacteria energy pressure temperature oxygen water chemical"
GOVERNMENT = "president minister government senate congress parliament law court police army officials secretary"
BUSINESS = "inc corp co ltd company companies bank group plc shares stock firm"
ANIMALS = "dog dogs cat cats horse horses bird birds fish cow cows pig pigs bear animal animals cattle hogs mouse"
COMPUTERS = "computer computers software program windows file files disk internet pc mac card video monitor"
MEDIA = "book film movie song album novel newspaper magazine television tv radio music band show"
PLACES = "city town river mountain island street lake sea ocean capital port village"
PEOPLE = "man men woman women people person boy girl patient patients player players"
NEGATIONS = "not no never none nothing nobody cannot except without"
FEELINGS = "good best great bad worst happy love hate fear hope worry nice terrible"


@dataclass(frozen=True)
class Predicate:
    """A regular expression that some place of the text fits, and two phrases for it."""

    phrases: tuple[str, str]
    pattern: re.Pattern[str]

    def __call__(self, text: str) -> bool:
        """Whether it holds."""
        return self.pattern.search(text.casefold()) is not None


def _fits(pattern: str, *phrases: str) -> Predicate:
    first, second = phrases
    return Predicate((first, second), re.compile(pattern))


def _names(words: str, *phrases: str) -> Predicate:
    return _fits(rf"\b({'|'.join(re.escape(word) for word in words.split())})(?!\w)", *phrases)


PREDICATES = {
    "digit": _fits(r"\d", "a number in digits", "a figure such as 3 or 1987"),
    "number word": _names(NUMBERS, "a number that is spelled out", "a word such as two or million"),
    "question mark": _fits(r"\?", "a question mark", "a mark that ends a question"),
    "comma": _fits(",", "a comma", "a pause that is written as a comma"),
    "hyphen": _fits(r"\w-\w", "a hyphen", "two words that a hyphen joins"),
    "quotation": _fits(r"``|''|\"", "a quotation", "words in quotation marks"),
    "first person": _names("i my me we our us", "the first person", "a word such as I or my"),
    "second person": _names("you your", "the second person", "a word that addresses the reader, such as you"),
    "she": _names("she her herself", "a female pronoun", "a word such as she or her"),
    "he": _names("he his him himself", "a male pronoun", "a word such as he or his"),
    "negation": _names(NEGATIONS, "a negation", "a word such as not, never or except"),
    "what": _fits("^what", "the word what at its start", "a beginning with what"),
    "who": _fits("^who", "the word who at its start", "a beginning with who"),
    "how": _fits("^how", "the word how at its start", "a beginning with how"),
    "which": _names("which", "the word which", "a choice that is put with which"),
    "and": _names("and", "the word and", "two things that and joins"),
    "long": _fits(r"(\S+\s+){15}", "many words", "more than fifteen words"),
    "short": _fits(r"^(\S+\s*){1,8}$", "few words", "at most eight words"),
    "long word": _fits(r"[a-z]{12}", "a long word", "a word of twelve letters or more"),
    "repetition": _fits(r"\b([a-z]{4,})\b.*\b\1\b", "a word that is repeated", "the same word twice"),
    "month": _names(MONTHS, "the name of a month", "a month such as April or June"),
    "country": _names(COUNTRIES, "the name of a country", "a nation such as Japan or France"),
    "color": _names(COLORS, "the name of a color", "a word such as red or blue"),
    "family": _names(FAMILY, "a member of a family", "a word such as mother or child"),
    "body": _names(BODY, "a part of the body", "a word such as eye or heart"),
    "time": _names(TIMES, "a unit of time", "a word such as hour or year"),
    "money": _names(MONEY, "something about money", "a word such as dollars or price"),
    "science": _names(SCIENCE, "a term of science", "a word such as protein or energy"),
    "government": _names(GOVERNMENT, "something about the state", "a word such as president or court"),
    "business": _names(BUSINESS, "something about companies", "a word such as shares or bank"),
    "animal": _names(ANIMALS, "the name of an animal", "a word such as dog or cattle"),
    "computer": _names(COMPUTERS, "something about computers", "a word such as software or disk"),
    "media": _names(MEDIA, "something about the media", "a word such as film or book"),
    "place": _names(PLACES, "a kind of place", "a word such as city or river"),
    "people": _names(PEOPLE, "a word for people", "a word such as man or patients"),
    "feeling": _names(FEELINGS, "a judgement or a feeling", "a word such as good or love"),
}
