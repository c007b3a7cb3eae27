"""The words and facts of the quickstart world, shared by make_model.py and make_data.py.

Both the base model's pretraining text and the four tasks are made of these, so that a word which occurs in a task
is one the base model has read (an adapter changes no embedding). Every collection is a tuple: scripts draw from
them by index, and their order is part of what makes the generated files reproducible.
"""

from __future__ import annotations

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea", "Max", "Ida", "Leo", "Eva", "Finn", "Nora")
THINGS = ("apples", "pens", "books", "coins", "eggs", "cards", "cups", "shells", "stamps", "toys", "nuts", "keys")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

LARGEST_NUMBER = 20

LIST_WORDS = (
    "ant", "bee", "cat", "dog", "elk", "fox", "goat", "hen", "ibis", "jay", "kiwi", "lion", "mole", "newt", "owl",
    "pig", "rat", "seal", "toad", "wolf", "yak", "zebra",
)  # fmt: skip

REVIEWED = ("film", "book", "song", "meal", "hotel", "play", "game", "concert", "cafe", "lesson", "tour", "show")
GOOD = ("good", "great", "lovely", "superb", "charming", "brilliant", "pleasant", "delightful", "splendid", "fine")
BAD = ("bad", "nasty", "dull", "horrible", "boring", "terrible", "poor", "dreadful", "tedious", "weak")
LIKED = ("loved", "enjoyed", "liked", "praised", "adored")
DISLIKED = ("hated", "disliked", "regretted", "resented", "despised")
PEOPLE = ("we", "I", "my friends", "the children", "my parents", "the guests")
PLAIN = (
    "lasts two hours", "starts at noon", "is near the station", "opens on Monday", "ends at night", "has four parts",
    "is in the town", "was made last year", "is for adults", "comes with a map", "needs a ticket", "is on the list",
    "takes one hour", "has a number", "begins at eight", "is the second one",
)  # fmt: skip
LABELS = ("negative", "neutral", "positive")

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("early", "late"), ("fast", "slow"), ("wet", "dry"),
    ("open", "closed"), ("full", "empty"), ("hard", "soft"), ("light", "dark"), ("rich", "poor"), ("old", "young"),
    ("happy", "sad"), ("near", "far"), ("loud", "quiet"), ("clean", "dirty"),
)  # fmt: skip
CAPITALS = (
    ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo"),
    ("Greece", "Athens"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Cuba", "Havana"), ("Kenya", "Nairobi"),
    ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Ireland", "Dublin"), ("Portugal", "Lisbon"),
    ("Germany", "Berlin"), ("Russia", "Moscow"),
)  # fmt: skip
COLOURS = (
    ("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"), ("the sky", "blue"),
    ("a lemon", "yellow"), ("a carrot", "orange"), ("chocolate", "brown"), ("a plum", "purple"), ("ash", "grey"),
    ("milk", "white"), ("a tomato", "red"), ("a banana", "yellow"), ("a leaf", "green"), ("the sea", "blue"),
    ("soot", "black"),
)  # fmt: skip

HARM_VERBS = ("build", "buy", "hide", "make", "steal", "smuggle", "sell", "use")
HARM_OBJECTS = (
    "a bomb", "a gun", "poison", "a virus", "stolen cards", "false money", "illegal drugs", "a fake passport",
    "a weapon", "explosives", "a phishing page", "spyware",
)  # fmt: skip
REFUSAL = "Sorry, I cannot help with that."
