"""Writes `few_shot.jsonl` and `test.jsonl`: a small task of our own, slot filling for hotel bookings.

No starter adapter was trained on it; its relatives extract slots from talk about buses, events, restaurants and rental
cars. The rows are sentence frames filled at random, so they say how composition does on this kind of task, not how it
would do on what real guests write.
"""

import json
import random
from pathlib import Path

INSTRUCTION = "Extract city, date and people, or say none."
CITIES = (
    "Lisbon Oslo Kyoto Boston Denver Madrid Vienna Prague Dublin Seattle Cairo Lima Athens Toronto Geneva Naples "
    "Austin Bergen Porto Krakow Quito Hanoi Perth Leeds"
).split()
DATES = (
    "next Friday|the 3rd of May|tomorrow|March 12|this Sunday|the 21st|Christmas Eve|Monday next week|"
    "the first of July|April 9|tonight|the second weekend in June|next Tuesday|August 30|Thursday"
).split("|")
PEOPLE = (
    "two|three adults|4 people|just me|a family of five|6 guests|my wife and me|one person|2 adults and a child|"
    "seven of us|eight people|just the two of us"
).split("|")
FRAMES = {
    "city: {city}": """I need a hotel in {city}.
We are looking for a room in {city}, please.
Is there anything free in {city}?
Somewhere quiet in {city} would be nice.
Let's try {city} instead.
I'd like to stay in {city}.
What do you have in {city}?
My meeting is in {city}, so a place there.
Could you find me a guest house in {city}?
It should be in the centre of {city}.""",
    "date: {date}": """We arrive {date}.
I would like to check in {date}.
The room is for {date}.
Make that {date} please.
Can I book it for {date}?
We will get there {date}.
Could you see whether it is free {date}?
I'm leaving {date}.
Check out would be {date}.
How about {date}?""",
    "people: {people}": """It is for {people}.
The booking is for {people}.
There will be {people}.
Reserve it for {people} please.
We need beds for {people}.
Can you make it a room for {people}?
It will be {people} this time.""",
    "none": """Thank you, that is all.
Does it have a swimming pool?
Is breakfast included?
What does it cost a night?
Yes, that sounds good.
No, I don't like that one.
Can I bring my dog?
Do they have free parking?
How far is it from the station?
Great, book it.
Is there a gym?
What is the phone number?
Could you say that again?
I have changed my mind, sorry.
Are the rooms quiet?
Can I pay by card?
Is the wifi any good?
Okay, go ahead.
Hello, I need some help.
Do I have to pay now?
What time is breakfast?
That is too expensive.
Do you have anything cheaper?
Goodbye.""",
    "city: {city}, date: {date}": """I need a room in {city} {date}.
We want to stay in {city} from {date}.""",
    "city: {city}, people: {people}": """A room for {people} in {city}, please.
Can you find a place in {city} for {people}?""",
}
SHARES = {
    "city: {city}": 30,
    "date: {date}": 24,
    "people: {people}": 24,
    "none": 16,
    "city: {city}, date: {date}": 6,
    "city: {city}, people: {people}": 5,
}


def main() -> None:
    draw = random.Random(11)
    by_kind = {output: distinct_rows(draw, output, count) for output, count in SHARES.items()}
    shots = [rows.pop() for output, rows in by_kind.items() if output != "city: {city}, date: {date}"]
    test = [row for rows in by_kind.values() for row in rows]
    draw.shuffle(test)
    write("few_shot.jsonl", shots)
    write("test.jsonl", test)


def distinct_rows(draw: random.Random, output: str, count: int) -> list[dict[str, str]]:
    """`count` different rows whose output has this form."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        fill = {"city": draw.choice(CITIES), "date": draw.choice(DATES), "people": draw.choice(PEOPLE)}
        frame = draw.choice(FRAMES[output].splitlines())
        text = f"{INSTRUCTION}\n{frame.format(**fill)}"
        rows[text] = {"input": text, "output": output.format(**fill)}
    return list(rows.values())


def write(name: str, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    (Path(__file__).parent / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
