"""Words that were misspelt: which of those that occur was meant.

A slip leaves a word's first letter alone, or exchanges it with the second: only words that begin so are looked at.
"""

from __future__ import annotations

from hubkit.catalogue.database import Database

SHORTEST, SHORT = 4, 5  # letters: a shorter word is taken as it is, a longer one may have two slips
MOST_COMPARED = 20_000


def nearest(database: Database, word: str) -> list[str]:
    """The words that `word` may have been meant for, the nearest first; none that occurs may be among them.

    Up to five letters have one slip at most, longer words two: a letter too many, too few or wrong, or two neighbours
    exchanged. A number means itself.
    """
    most = slips(word)
    if not most:
        return []
    rows = database.rows(
        "SELECT term FROM terms WHERE (term BETWEEN :same AND :same || char(0x10FFFF) OR "
        "term BETWEEN :turned AND :turned || char(0x10FFFF)) AND abs(length(term) - :length) <= :most LIMIT :limit",
        {"same": word[0], "turned": word[1::-1], "length": len(word), "most": most, "limit": MOST_COMPARED},
    )
    near = [(distance(word, term, most), abs(len(term) - len(word)), term) for (term,) in rows]
    return [term for found, _, term in sorted(near) if found <= most]


def slips(word: str) -> int:
    """How many slips a word may have."""
    if len(word) < SHORTEST or any(map(str.isdigit, word)):
        return 0
    return 1 if len(word) <= SHORT else 2


def distance(one: str, other: str, most: int) -> int:
    """The slips between two words (optimal string alignment), or `most` + 1 where there are more."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, opposite in enumerate(other, 1):
            least = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != opposite))
            if i > 1 and j > 1 and letter == other[j - 2] and opposite == one[i - 2]:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        if min(row) > most and min(last) > most:  # an exchange reaches back over one row
            return most + 1
        before, last = last, row
    return min(last[-1], most + 1)
