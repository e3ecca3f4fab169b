"""Scores of short answers about pictures: VQA accuracy, and ANLS of documents."""

import re
from collections.abc import Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The evaluation code of VQA has this table, odd entries included (somebody'd).
_CONTRACTIONS = """
ain't:aint aren't:arent can't:cant could've:couldve couldn't:couldnt couldn't've:couldn'tve,couldnt've
didn't:didnt doesn't:doesnt don't:dont hadn't:hadnt hadn't've:hadnt've,hadn'tve hasn't:hasnt haven't:havent
he'd:hed he'd've:hed've,he'dve he's:hes how'd:howd how'll:howll how's:hows isn't:isnt it'd:itd
it'd've:itd've,it'dve it'll:itll ma'am:maam mightn't:mightnt mightn't've:mightnt've,mightn'tve might've:mightve
mustn't:mustnt must've:mustve needn't:neednt not've:notve o'clock:oclock oughtn't:oughtnt
'ow's'at:ow's'at,'ows'at,'ow'sat shan't:shant she'd've:shed've,she'dve should've:shouldve shouldn't:shouldnt
shouldn't've:shouldnt've,shouldn'tve somebodyd:somebody'd somebody'd've:somebodyd've,somebody'dve
somebody'll:somebodyll somebody's:somebodys someone'd:someoned someone'd've:someoned've,someone'dve
someone'll:someonell someone's:someones something'd:somethingd something'd've:somethingd've,something'dve
something'll:somethingll that's:thats there'd:thered there'd've:thered've,there'dve there're:therere
there's:theres they'd:theyd they'd've:theyd've,they'dve they'll:theyll they're:theyre they've:theyve 'twas:twas
wasn't:wasnt we'd've:wed've,we'dve we've:weve weren't:werent what'll:whatll what're:whatre what's:whats
what've:whatve when's:whens where'd:whered where's:wheres where've:whereve who'd:whod who'd've:whod've,who'dve
who'll:wholl who's:whos who've:whove why'll:whyll why're:whyre why's:whys won't:wont would've:wouldve
wouldn't:wouldnt wouldn't've:wouldnt've,wouldn'tve y'all:yall y'all'll:yall'll,y'allll
y'all'd've:yall'd've,y'alld've,y'all'dve you'd:youd you'd've:youd've,you'dve you'll:youll you're:youre you've:youve
"""
_WRITTEN_OUT = {
    wrong: right
    for entry in _CONTRACTIONS.split()
    for right, others in [entry.split(":")]
    for wrong in others.split(",")
}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# At most this many: the evaluation code passes a flag of regular expressions where the number of replacements stands.
_MOST_PERIODS = 32
_PERIOD = re.compile(r"\.(?!\d)")


def vqa_accuracy(answer: str, references: Sequence[str], *, released: bool = False) -> float:
    """Accuracy of an answer to a question with several reference answers, ten as a rule, in [0, 1].

    For each reference the answer is compared with all others: each that is equal is worth a third, at most 1 in all;
    the mean over the references counts. Equal to the evaluation code of VQA (GT-Vision-Lab/VQA), whose normalization
    only applies where the references differ.

    Args:
        released: as the evaluation code of Qwen-VL, which always normalizes the answer, and of references only the
            punctuation: "Two" is no "two" there, and numbers in words are never right.

    Raises:
        ValueError: fewer than two references: leaving one out leaves none to compare with.
    """
    if len(references) < 2:
        raise ValueError(f"VQA accuracy needs several reference answers, found {len(references)}")
    answer = _one_line(answer)
    # That code strips the references, the released one takes them as they are.
    references = list(references) if released else [_one_line(one) for one in references]
    differ = len(set(references)) > 1
    if released:
        answer = _words(_without_punctuation(answer))
        references = [_without_punctuation(one) if differ else one for one in references]
    elif differ:
        answer, *references = (_words(_without_punctuation(one)) for one in (answer, *references))
    equal = sum(one == answer for one in references)
    accuracies = [min(1.0, (equal - (one == answer)) / 3) for one in references]
    return sum(accuracies) / len(accuracies)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Signs become spaces between words, and nothing at their edges and in a text with a number like 1,000."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        at_edge = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if at_edge or in_number else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _words(text: str) -> str:
    """In lower case, numbers as digits, without articles, contractions with their apostrophes."""
    found = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_WRITTEN_OUT.get(word, word) for word in found if word not in _ARTICLES)


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Similarity to the nearest reference, in [0, 1]: 1 less the edit distance over the longer length (DocVQA).

    Case and the number of blanks do not count. A similarity that is not above 1 - `threshold` is 0: such an answer was
    read at another place.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("ANLS needs a reference answer, found none")
    mine = " ".join(answer.lower().split())
    return max(_similarity(mine, " ".join(one.lower().split()), threshold) for one in references)


def _similarity(one: str, other: str, threshold: float) -> float:
    longer = max(len(one), len(other))
    distance = edit_distance(one, other) / longer if longer else 0.0
    return 1 - distance if distance < threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, right in enumerate(other, 1):
            above = row[place]
            row[place] = min(above + 1, row[place - 1] + 1, diagonal + (left != right))
            diagonal = above
    return row[-1]
