"""The words behind CLIP's zero-shot heads: class names and prompt templates of the usual twenty tasks.

Names and templates are CLIP's own prompt lists (arXiv:2103.00020), spelling mistakes included: the public experts were
fine-tuned against heads made of exactly these words. Data sets that carry their class names in words keep them.
"""

from collections.abc import Sequence

from adamerge.errors import InputError

#: For tasks that are not in the table.
DEFAULT_TEMPLATES = ("a photo of a {}.",)

_A_THE = ("a photo of a {}.", "a photo of the {}.")
_CIFAR = tuple(
    f"a {photo} {article} {size}{{}}."
    for article in ("a", "the")
    for photo, size in (
        *(("photo of", ""), ("blurry photo of", ""), ("black and white photo of", ""), ("low contrast photo of", "")),
        *(("high contrast photo of", ""), ("bad photo of", ""), ("good photo of", "")),
        *(("photo of", "small "), ("photo of", "big ")),
    )
)
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "sun397": _A_THE,
    "cars": (
        *(*_A_THE, "a photo of my {}.", "i love my {}!"),
        *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
    ),
    "resisc45": tuple(
        f"{platform} {medium} of {article}{{}}."
        for article in ("", "a ", "the ")
        for medium in ("imagery", "photo", "view")
        for platform in ("satellite", "aerial")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "svhn": ('a photo of the number: "{}".',),
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "mnist": ('a photo of the number: "{}".',),
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "pcam": ("this is a photo of {}",),
    "fer2013": (
        *(
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
        ),
        *("a face that looks {}.", "they look {}.", "look at how {} they are."),
    ),
    "pets": ("a photo of a {}, a type of pet.",),
    "stl10": _A_THE,
    "cifar100": _CIFAR,
    "cifar10": _CIFAR,
    "food101": ("a photo of {}, a type of food.",),
    "fashionmnist": _A_THE,
    "emnist": ('a photo of the digit character: "{}".',),
    "kmnist": ("a photo of the character {}.",),
    "sst2": ("a {} review of a movie.",),
}

#: Prompt words where data sets have numbers, codes or other words: "what a data set says=what the prompt says", in
#: the order of the labels. Data sets whose labels are mere numbers get them by position.
_WORDS: dict[str, str] = {
    "eurosat": "AnnualCrop=annual crop land; forest; HerbaceousVegetation=brushland or shrubland; "
    "Highway=highway or road; Industrial=industrial buildings or commercial buildings; Pasture=pasture land; "
    "PermanentCrop=permanent crop land; Residential=residential buildings or homes or apartments; river; "
    "SeaLake=lake or sea",
    "mnist": "0 zero=0; 1 one=1; 2 two=2; 3 three=3; 4 four=4; 5 five=5; 6 six=6; 7 seven=7; 8 eight=8; 9 nine=9",
    "gtsrb": "red and white circle 20 kph speed limit; red and white circle 30 kph speed limit; "
    "red and white circle 50 kph speed limit; red and white circle 60 kph speed limit; "
    "red and white circle 70 kph speed limit; red and white circle 80 kph speed limit; "
    "end / de-restriction of 80 kph speed limit; red and white circle 100 kph speed limit; "
    "red and white circle 120 kph speed limit; red and white circle red car and black car no passing; "
    "red and white circle red truck and black car no passing; red and white triangle road intersection warning; "
    "white and yellow diamond priority road; red and white upside down triangle yield right-of-way; stop; "
    "empty red and white circle; red and white circle no truck entry; "
    "red circle with white horizonal stripe no entry; red and white triangle with exclamation mark warning; "
    "red and white triangle with black left curve approaching warning; "
    "red and white triangle with black right curve approaching warning; "
    "red and white triangle with black double curve approaching warning; "
    "red and white triangle rough / bumpy road warning; red and white triangle car skidding / slipping warning; "
    "red and white triangle with merging / narrow lanes warning; "
    "red and white triangle with person digging / construction / road work warning; "
    "red and white triangle with traffic light approaching warning; "
    "red and white triangle with person walking warning; "
    "red and white triangle with child and person walking warning; red and white triangle with bicyle warning; "
    "red and white triangle with snowflake / ice warning; red and white triangle with deer warning; "
    "white circle with gray strike bar no speed limit; blue circle with white right turn arrow mandatory; "
    "blue circle with white left turn arrow mandatory; blue circle with white forward arrow mandatory; "
    "blue circle with white forward or right turn arrow mandatory; "
    "blue circle with white forward or left turn arrow mandatory; "
    "blue circle with white keep right arrow mandatory; blue circle with white keep left arrow mandatory; "
    "blue circle with white arrows indicating a traffic circle; "
    "white circle with gray strike bar indicating no passing for cars has ended; "
    "white circle with gray strike bar indicating no passing for trucks has ended",
    "pcam": "lymph node; lymph node containing metastatic tumor tissue",
    "fer2013": "angry; disgust=disgusted; fear=fearful; happy; neutral; sad; surprise=surprised",
    "emnist": "A; B; C; D; E; F; G; H; I; J; K; L; M; N; O; P; Q; R; S; T; U; V; W; X; Y; Z",
    "kmnist": "o=お; ki=き; su=す; tsu=つ; na=な; ha=は; ma=ま; ya=や; re=れ; wo=を",
    "sst2": "negative; positive",
}
_UNORDERED = ("fer2013",)  # copies of this data set number their labels differently
_OTHER_NAMES = {
    "stanfordcars": "cars", "oxfordflowers102": "flowers102", "oxfordiiitpet": "pets", "oxfordpets": "pets",
    "emnistletters": "emnist", "renderedsst2": "sst2",
}  # fmt: skip


def usual_templates(task: str) -> tuple[str, ...]:
    """The task's prompt templates, `{}` standing for the class name."""
    return _TEMPLATES.get(_key(task), DEFAULT_TEMPLATES)


def prompt_names(task: str, classes: Sequence[str]) -> tuple[str, ...]:
    """A data set's class names as words for prompts, in the same order.

    Numbered classes of a known task get their names by position, other spellings of a known class its usual name; for
    everything else underscores become spaces.
    """
    key = _key(task)
    words = [word.split("=") for word in _WORDS[key].split("; ")] if key in _WORDS else []
    if words and all(name.strip().isdecimal() for name in classes):
        if key in _UNORDERED:
            raise InputError(
                f"task {task!r}: copies of its data set number the classes differently, and this one names none; "
                "give class_names"
            )
        if len(words) == len(classes):
            return tuple(word[-1] for word in words)
    known = {_plain(spelling): word[-1] for word in words for spelling in word}
    return tuple(known.get(_plain(name), _tidy(name, slashes=key == "sun397")) for name in classes)


def _key(task: str) -> str:
    plain = _plain(task)
    return _OTHER_NAMES.get(plain, plain)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _tidy(name: str, slashes: bool) -> str:
    """`polka_dotted` -> `polka dotted`; SUN397 also has `apse/indoor`."""
    return " ".join((name.replace("/", " ") if slashes else name).replace("_", " ").split())
