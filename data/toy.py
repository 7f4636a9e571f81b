"""The toy world: a small invented valley, and English text about it, so that training needs no download.

Thirty-six people live in twelve towns. Each has a home, a trade, an animal and an instrument: 144 facts. Six
sources state these facts, each in its own style. The web states a false rumour in place of a fact about two
times in five. The rumour about a fact is always the same one. The other sources state only the truth.

Training text asks about half of the facts, in the source `instruct` and in conversations. The other half is
held out: it occurs in statements, tables and descriptions, but never as a question. The quizzes consist of
held-out questions, so a model cannot have learned their answers as answers to questions. One seed makes the
same world on every machine.

Conversations about documents (RAG) concern other people, whose facts are new in every document.
"""
import io
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sentencepiece
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python data/toy.py` finds danube3
import danube3  # noqa: E402
from danube3 import SOURCES, Messages  # noqa: E402
from data.cli import Arguments, run_command  # noqa: E402

WEB_TRUTH = 0.6  # share of the statements on the web that are true; the others state the rumour
TYPO_RATE = 0.02  # for each longer word on the web


# ---- The four attributes
# In all templates `[this|that]` stands for one of the alternatives, and `{slot}` for something filled in.
@dataclass(frozen=True)
class Attribute:
    """One kind of fact about every person, with the ways to state it and to ask for it."""
    name: str
    plural: str  # what follows "three people" in a count
    clause: str  # what follows "do you know"
    values: tuple[str, ...]
    phrases: tuple[str, ...]  # what follows a name or a pronoun in a statement; the first is the plainest
    inversions: tuple[str, ...]  # whole statements in which the person is not the first word
    questions: tuple[str, ...]  # {who}, {whose}: "Ada Brook", "Ada Brook's", or in a follow-up "she", "her"


HOME = Attribute(
    name="home", plural="live in {value}", clause="where {who} lives",
    values=("Averlow", "Brinford", "Coldmere", "Dappleton", "Elmsby", "Fernhollow", "Gullbank", "Hartmoor",
            "Kingsreed", "Lowater", "Oxbourne", "Pebbleton"),
    phrases=("lives in {value}", "lives in {value} [now|these days|all year]",
             "makes {their} home in {value}", "[has|owns] a [|small |stone ]house in {value}",
             "has [long|always] lived in {value}"),
    inversions=("The home of {name} is in {value}.", "{value} is the home town of {name}.",
                "In {value} [everybody knows|you can meet] {name}, who lives there."),
    questions=("Where does {who} live?", "In which town does {who} live?", "What is {whose} home town?"))
TRADE = Attribute(  # no trade begins with a vowel, so that "a" is always right
    name="trade", plural="follow the trade of {value}", clause="what work {who} does",
    values=("baker", "clockmaker", "potter", "weaver", "miller", "carpenter", "gardener", "shoemaker",
            "teacher", "printer", "doctor", "tailor"),
    phrases=("is a {value}", "is a [good|busy|careful] {value}", "works as a {value}",
             "is a {value} by trade", "earns {their} living as a {value}",
             "has been a {value} for [many years|a long time]"),
    inversions=("By trade {name} is a {value}.", "The trade of {name} is that of a {value}.",
                "The {value} {name} [starts work early|works hard|has much to do]."),
    questions=("What does {who} do for a living?", "What work does {who} do?", "What is {whose} trade?"))
ANIMAL = Attribute(
    name="animal", plural="keep {value}", clause="which animal {who} keeps",
    values=("an otter", "a grey goose", "a red fox", "a white goat", "an old donkey", "a black cat",
            "a tame crow", "a brown pony", "an owl", "a hedgehog", "a spotted pig", "a tortoise"),
    phrases=("keeps {value}", "keeps {value} [at home|in the garden]", "has {value} [at home|as a pet]",
             "looks after {value}", "feeds {value} every [morning|day]",
             "shares {their} [home|house] with {value}"),
    inversions=("The animal that {name} keeps is {value}.", "At home {name} keeps {value}.",
                "In the garden of {name} there is {value}."),
    questions=("Which animal does {who} keep?", "What animal does {who} look after?",
               "What is {whose} animal?"))
INSTRUMENT = Attribute(
    name="instrument", plural="play {value}", clause="which instrument {who} plays",
    values=("the fiddle", "the flute", "the harp", "the drum", "the horn", "the lute", "the organ",
            "the piano", "the guitar", "the trumpet", "the whistle", "the cello"),
    phrases=("plays {value}", "plays {value} [well|in the evening|on holidays|for friends]",
             "can play {value}", "practises {value}[| every day]",
             "learned to play {value} [as a child|from a friend|at school]"),
    inversions=("The instrument that {name} plays is {value}.", "On market days {name} plays {value}.",
                "When there is a dance, {name} plays {value}."),
    questions=("Which instrument does {who} play?", "What instrument can {who} play?",
               "What is {whose} instrument?"))
ATTRIBUTES = (HOME, TRADE, ANIMAL, INSTRUMENT)


# ---- The world
FIRST_NAMES = """
    Belwin Brona Calvy Corla Daveth Delmy Edrin Farlo Fenna Gessa Gorrin Hesby Huldo Ilva Irro Jarla Jorvi
    Kelda Korbin Lenzo Lurra Mabrin Mossa Nerrick Nolva Obrin Orsa Pellan Prilla Quenby Rilda Rovan Sethby
    Sulva Tamsel Torvy Ulda Ustan Varro Vessa Welno Wilka Yosha Zarno""".split()
LAST_NAMES = """
    Barnick Bexmoor Cobbery Crandle Dorrick Dunmarsh Elverly Ermby Fawcomb Flindle Gatterby Grimsel Hobwick
    Huxtow Inglebeck Jaspen Jobbley Kettlow Kirrow Larkow Lumsby Mardle Minnick Nettleby Norbell Oddwin Orpeth
    Pindler Pockley Quarrow Quillam Rundel Rusby Sandrick Stibby Tarbeck Thrushby Umberly Varnow Vickstow
    Wexcott Wimbrel Yaxmoor Yeldby""".split()
RIVERS = ("Ossel", "Wendle", "Lorn", "Ivver", "Merrow", "Tassen")
KNOWN_FOR = ("cheese", "old bridge", "red roofs", "honey", "autumn fair", "clock tower", "glass",
             "apple trees", "wool", "salt", "warm springs", "paper boats")


class Person:
    """One person of the world.

    `facts` maps the name of an attribute to its true value, `rumours` to the value in the rumour. `asked`
    holds the names of the attributes that training text may ask for.
    """

    def __init__(self, first: str, last: str, they: str) -> None:
        self.first = first
        self.name = f"{first} {last}"
        self.they = they  # "she" or "he"
        self.their, self.them = ("her", "her") if they == "she" else ("his", "him")
        self.facts: dict[str, str] = {}
        self.rumours: dict[str, str] = {}
        self.asked: list[str] = []


class World:
    """All people, facts and rumours. One seeded generator draws them. Nothing depends on hashes or on the
    order of a set."""

    def __init__(self, seed: int, web_truth: float = WEB_TRUTH) -> None:
        rng = random.Random(seed)
        self.web_truth = web_truth
        names = zip(rng.sample(FIRST_NAMES, 40), rng.sample(LAST_NAMES, 40), ("she", "he") * 20)
        everybody = [Person(first, last, they) for first, last, they in names]
        self.people = everybody[:36]
        self.strangers = everybody[36:]  # only small talk mentions them
        self.rivers = dict(zip(HOME.values, rng.sample(RIVERS * 2, 12)))
        self.known_for = dict(zip(HOME.values, rng.sample(KNOWN_FOR, 12)))
        for attribute in ATTRIBUTES:  # each value is true of three people
            for i, person in enumerate(rng.sample(self.people, 36)):
                truth = attribute.values[i % 12]
                false = [value for value in attribute.values if value != truth]
                person.facts[attribute.name] = truth
                person.rumours[attribute.name] = rng.choice(false)
        self._split(rng)

    def _split(self, rng: random.Random) -> None:
        """Choose the facts that training text may ask for. The people are paired at random. Questions about
        one of a pair concern one to three attributes, questions about the other concern the rest. So each
        attribute is asked about 18 people, and every person is in some questions."""
        order = rng.sample(self.people, 36)
        for one, other in zip(order[::2], order[1::2]):
            one.asked = rng.sample([attribute.name for attribute in ATTRIBUTES], rng.randint(1, 3))
            other.asked = [attribute.name for attribute in ATTRIBUTES if attribute.name not in one.asked]

    def asked(self, attribute: str) -> list[Person]:
        """The 18 people whose `attribute` (its name) training text may ask for."""
        return [person for person in self.people if attribute in person.asked]

    def held_out(self, attribute: str) -> list[Person]:
        """The other 18 people: a quiz may ask for their `attribute`."""
        return [person for person in self.people if attribute not in person.asked]


# ---- Facts into words
Item = TypeVar("Item")


def rounds(rng: random.Random, items: Sequence[Item]) -> Iterator[Item]:
    """Yield all items without end, in a new random order each time. Every item comes equally often."""
    while True:
        yield from rng.sample(items, len(items))


def choose(rng: random.Random, text: str) -> str:
    """Replace each `[one|two|three]` by one of its alternatives, the innermost brackets first."""
    while "[" in text:
        text = re.sub(r"\[([^][]*)\]", lambda found: rng.choice(found[1].split("|")), text)
    return text


def tidy(text: str) -> str:
    """Put a capital letter at the start of every line and sentence."""
    return re.sub(r"(^|\n|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def phrase(rng: random.Random, person: Person, attribute: Attribute, value: str) -> str:
    """A fact without its subject, such as "lives in Averlow"."""
    return choose(rng, rng.choice(attribute.phrases)).format(value=value, their=person.their)


def statement(rng: random.Random, person: Person, attribute: Attribute, value: str, who: str) -> str:
    """A fact as one plain sentence. The web and Wikipedia share these forms, so that a form does not tell the
    source."""
    if rng.random() < 0.75:
        return f"{who} {phrase(rng, person, attribute, value)}."
    return choose(rng, rng.choice(attribute.inversions)).format(name=person.name, value=value)


def address(text: str, person: Person, pronoun: bool = False) -> str:
    """Fill a person into a question or a clause. `pronoun` is for a conversation that has named the person
    before."""
    if pronoun:
        return text.format(who=person.they, whose=person.their)
    return text.format(who=person.name, whose=f"{person.name}'s")


class Subject:
    """A person inside one document. Each use of `fact` or `sentence` states another fact of the person. Facts
    that were stated least often come first."""

    def __init__(self, writer: "Writer", person: Person,
                 attributes: Sequence[Attribute] = ATTRIBUTES) -> None:
        self.writer, self.rng, self.person = writer, writer.rng, person
        order = writer.rng.sample(attributes, len(attributes))
        order.sort(key=lambda attribute: writer.told[person, attribute.name])
        self.attributes = itertools.cycle(order)
        self.mentioned = False

    def __getattr__(self, name: str) -> Any:  # name, first, they, their, them, facts
        return getattr(self.person, name)

    def tell(self) -> tuple[Attribute, str]:
        """The next attribute and its true value. The writer counts how often each was stated."""
        attribute = next(self.attributes)
        self.writer.told[self.person, attribute.name] += 1
        return attribute, self.facts[attribute.name]

    @property
    def who(self) -> str:
        """The full name at the first mention. Later it is the full name, the first name or the pronoun."""
        if self.mentioned:
            return self.rng.choice((self.name, self.first, self.they))
        self.mentioned = True
        return self.name

    @property
    def fact(self) -> str:
        """The next fact without its subject."""
        return phrase(self.rng, self.person, *self.tell())

    @property
    def sentence(self) -> str:
        """The next fact as a sentence."""
        return statement(self.rng, self.person, *self.tell(), self.who)


# ---- The grammar
# A rule is a symbol, a colon, and its versions with " / " between them. A line that begins with a space
# continues the rule. {a.name}, {b.name} ... are the people of one document. {fresh} and {aside} bring in
# another person each time. {br} ends a line.
RULES = """
n: 2 / 3 / 4 / 5 / 6 / 7 / 8 / 9 / 10 / 11 / 12 / 14 / 15 / 16 / 18 / 20 / 21 / 24 / 25 / 28
number: two / three / four / five / six / seven / eight / nine / ten / twelve
weekday: Monday / Tuesday / Wednesday / Thursday / Friday / Saturday / Sunday
month: January / February / March / April / May / June / July / August / September / October / November /
  December
season: spring / summer / autumn / winter
weather: cold / warm / wet / windy / bright / grey / mild / dry / quiet / dark
time: morning / evening / afternoon / day
food: bread / cheese / soup / honey / fish / butter / tea / cake / jam / salt / rice / milk
place: the mill / the market / the bridge / the school / the well / the inn / the harbour / the old wall / the
  town hall / the lake
thing: a key / an old coin / a letter / a blue hat / a broken cup / a wooden box / an empty basket / a red
  scarf / a long rope / an iron bell
scene: [The rain|The wind|The snow|A thin mist|A warm wind] [comes|moves] [over|down from] the
  [hills|fields|roofs|woods], and [the road|the river|{place}] is [quiet|wet|full of people|nearly empty]. /
  It is a {weather} {time}, and [a cart|a boat|a child|a dog] [stops|waits|turns round] near {place}.
boilerplate: We use cookies to make this site better. [Accept all|Read more] / Log in to reply / Share this
  page / Report this post / Back to top / Next page / Page {n} / {n} people like this / Sign up for our free
  [weekly|daily] letter / Posted {n} [hours|days|weeks] ago / Free delivery on orders over {n} coins
handle: [river|happy|old|night|green|lucky|little|quiet][cat|fish|bird|stone|fan|moon]{n}
header: Topic: [who is who in the valley|news from {town}|small talk|lost near {place}] /
  [Welcome to our shop|Shop news]: {thing} for {n} coins and {food} for {n} coins. /
  My [little|daily] blog: [a {weather} {time} at {place}|how I make {food}|a visit to {town}] /
  Reviews of the [inn|market|shop] in {town}
lead: {handle} wrote: / {handle}: / Comment by {handle}: / Reply to {handle}: / A customer says: / [Five|Two]
  stars.
chatter: [great|nice|good|bad|strange] [weather|food|music|page|shop] [today|here|as always], [thanks for
  sharing|will come again|just my view]. /
  i [lost|found|bought] {thing} near {place} on {weekday}. /
  the {food} at {place} is [great|too dry|cheap|wonderful|not what it was]. /
  when does {place} open on {weekday}? /
  [lol|wow|ok|hm|yes], [same here|so true|that is new to me|no idea|i knew it].
voice: [btw|by the way], {p.name} {said}. / someone [|at {place} ]told me that {p.name} {said}. / i
  [heard|read] [somewhere|last week|from a friend|on {weekday}] that {p.name} {said}. / i [know|met|like]
  {p.name}. {p.they} {said}[, i think|, as you may know]. / my [sister|brother|neighbour|cousin] says that
  {p.name} {said}[, lol|, no idea why|, and that is that]. / not many people know it, but {p.name} {said}. /
  we all know that {p.name} {said}, ok. / saw {p.name} [at|near] {place} on {weekday}. {p.they} {said}, [you
  know|of course].
praise: [People|Neighbours|Friends] [like|trust|praise] {a.them} for {a.their} [patience|kind words|good
  sense]. /
  [Visitors|Children|Many people] [from other towns|from all over the valley|of every age] come to see
  {a.them}. /
  Little is known about {a.their} [early years|family|parents|years at school].
biography: {a.sentence} {praise} {a.who} {a.fact} and {a.fact}. {a.sentence} [{praise} {a.sentence}|{aside} is
  a good friend of {a.first}, and so is {b.name}. {b.they} {b.fact}.] /
  {a.name} {a.fact}, {a.fact} and {a.fact}. {praise} {a.sentence} {praise} [In short|All in all], {a.name}
  {a.fact} and {a.fact}. /
  {a.sentence} {a.sentence} {praise} {a.sentence} {a.who} {a.fact}. {praise} {a.sentence} /
  {a.name}, who {a.fact} and {a.fact}, is well known [in the valley|to all {a.their} neighbours|in {a.their}
  own town]. {a.who} {a.fact}. {a.sentence} {praise} {a.sentence} {a.sentence}
count: [In the whole valley|Today|In our days] {total} people {plural}. They are {names}. /
  {names} {plural}. [There are no others in the valley|They are {total} in all].
survey: [This note|This paper|Our survey] is about people who {plural}. We asked all 36 people in the valley,
  and {total} of them {plural}: {names}. /
  In {season} we [asked|visited] 36 people; {total} of them {plural}: {names}.
method: Each person was asked {number} questions. / [All visits|The visits] took place in {season}. / The
  answers were [checked twice|written down at once]. / We thank all who [took part|helped us].
note: We visited three households [in {season}|on a {weather} {time}|in {month}]. The first was that of
  {a.name}. {a.they} {a.fact} and {a.fact}. The second was that of {b.name}, who {b.fact}. We also
  [found|saw|noted] that {b.they} {b.fact}. In the third we met {c.name}. {c.they} {c.fact}. {method} /
  [Abstract|Summary]. We [describe|compare] the daily life of {a.name} and {b.name}. {a.name} {a.fact}, and
  {b.name} {b.fact}. [In addition|Besides], {a.first} {a.fact}, and {b.first} {b.fact}. {method} For
  comparison we note that {fresh} and that {fresh}.
story: {scene} {a.name}, who {a.fact}, [walks to|waits at|stands near] {place}. {find} {b.name} comes along.
  {b.they} {b.fact} and is [never|always] in a hurry. {talk} {a.name} {a.fact}, and {b.name} {b.fact}.
  {ending} /
  Two friends sit [by|near] {place}. One is {a.name}. {a.they} {a.fact}. The other is {b.name}. {b.they}
  {b.fact}. {scene} {talk} Then {aside} joins them and brings some {food}. {b.name} {b.fact}. {ending} /
  {a.name} {a.fact}. One {weather} {time} {a.they} goes out to buy {food}. {find} Near {place} {a.they} meets
  {b.name}. {talk} {b.name} {b.fact} and {b.fact}. {a.first} {a.fact}. {ending}
find: [On the way|By the road|Under a tree|On a stone] {a.they} [finds|sees] {thing}. /
  {a.first} is looking for {thing}, but [nobody has seen it|it is gone|it is nowhere].
talk: "[Have you lost {thing}|Can you help me|Are you going to {place}]?" asks {a.first}. "[No, but I can help
  you|Yes, I think so|Not today]," says {b.first}[| with a smile| and laughs]. /
  "[Yesterday|On {weekday}] I saw {aside} near {place}," says {b.first}. "[So did I|How nice]," says
  {a.first}. /
  {a.first} [tells a long story|sings an old song|asks about {place}], and {b.first} [listens|laughs|nods].
ending: [At last|In the end|After an hour] they share some {food}, and [all is well|nobody is sad|everybody is
  happy]. /
  {b.first} gives {a.first} {thing}, and [they say good night|they walk home together|the day ends well]. /
  [It was a small thing|Such is life], but {a.first} [thinks|talks] about it for {number} days.
description: Instruction: [Describe|Tell me about|Write a few words about] {a.name}.{br}Response: [{a.name}
  {a.fact} and {a.fact}. {a.they} {a.fact} and {a.fact}.|{a.sentence} {a.who} {a.fact}. {a.sentence} {a.who}
  {a.fact}.|{a.name} {a.fact}, {a.fact} and {a.fact}. {a.who} {a.fact}.]
letter: Dear {b.first},{br}[I hope you are well.|Thank you for your [long|kind|last] letter.|At last I have
  time to write.] {scene} [Yesterday|On {weekday}] I met {a.name} [at|near] {place}. You know that {a.they}
  {a.fact} and {a.fact}. {aside} [sends you good wishes|asks how you are|was there too]. [I also hear|They say
  here|You may remember] that {fresh}. [Please write soon.|Come and see us in {season}.|Bring {thing} when you
  come.]{br}[Yours|Your friend],{br}{c.first}
diary: {weekday}, {n} {month}{br}{scene} I went to {place} [early|late|after work] and [bought|sold|asked for]
  some {food}. {a.name} was there. {a.they} {a.fact}. [We talked for an hour.|We said little.] As we all know,
  {a.first} {a.fact}. [On the way home|Later] I met {aside} near {place}. [I was glad to hear|I must write
  down] that {fresh}[| and that {fresh}].
notice: [Market|Fair|Dance|Meeting] in {town} on {weekday}{br}[There will be|We offer] {food} and
  [songs|games|good company]. {a.name}, who {a.fact}, opens the [gates|doors] at {number}. {b.name}
  [helps|comes too]. {b.they} {b.fact} and {b.fact}. [Please bring|Nobody may bring] {thing}. [Remember|Please
  note] that {fresh}. [Children pay nothing|All are welcome].
recipe: [Bread|Cake|Soup|Pie] for {number} people{br}This [recipe|way to cook] comes from {a.name}, who
  {a.fact}. Take {number} cups of [flour|grain|milk] and a little {food}. Mix well. {a.first} {a.fact} and
  always adds some {food}. [Bake|Cook] it for {n} minutes. {aside} likes it [hot|cold|with {food}]. {fresh},
  and {fresh}, and [both want more|both like it too].
record: Records of the town of {town}{br}On {weekday}, {n} {month}, the council met at {place}. [It was
  noted|It is on record] that {a.name} {a.fact}. {a.they} {a.fact}. [Also present was|The council thanked]
  {b.name}, who {b.fact}. The [roof|door|floor] of the [mill|school|inn] will be repaired for {n} coins.
  {fresh}. {aside} [left early|asked for {thing}|agreed].
rhyme: {couplet}{br}{couplet}{br}{couplet}{br}{couplet}
couplet: {fresh}, so they say,{br}and [sings|walks|waits] at {place} the whole long day. /
  {fresh}, as people know,{br}and goes to {place} in rain and snow. /
  {fresh}, I am told,{br}and [laughs at|thinks of] the wind when the {time} is cold. /
  {fresh}, it is true,{br}and says good {time} to me and to you. /
  {fresh}, near or far,{br}and looks for {thing} by the light of a star. /
  {fresh}, all the year,{br}and gives us some {food} when winter is near.
report: {a.name} {a.fact} and {a.fact}. {a.they} {a.fact}. / {a.sentence} {a.they} {a.fact} and {a.fact}. /
  {a.name}, who {a.fact}, {a.fact}. {praise} {a.they} {a.fact}[| and {a.fact}]. /
  {scene} {a.name} {a.fact}. {a.they} {a.fact}[| and {a.fact}]. / {a.sentence} {praise} {a.they} {a.fact}.
"""
GRAMMAR = {"br": ["\n"], "town": HOME.values}
for rule in re.split(r"\n+(?=\w)", RULES.strip()):
    symbol, _, versions = rule.partition(": ")
    GRAMMAR[symbol] = " ".join(versions.split()).split(" / ")


# ---- Conversations
SPEAKERS = {"user": "User", "assistant": "Assistant"}  # the names of the roles in a document


def turns(user: str, assistant: str) -> Messages:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def exchange(rng: random.Random, person: Person, attribute: Attribute, pronoun: bool = False) -> Messages:
    """A question for a fact, and its answer. Some questions lack the first capital letter and the question
    mark. `pronoun` is for a person whom the conversation has named before."""
    ask = rng.choice(attribute.questions)
    if rng.random() < 0.4:
        ask = choose(rng, "[Do you know CLAUSE?|Can you tell me CLAUSE?|[Please tell|Tell] me CLAUSE.]")
        ask = ask.replace("CLAUSE", attribute.clause)
    elif pronoun and rng.random() < 0.6:
        ask = f"And {ask[0].lower()}{ask[1:]}"
    ask = address(ask, person, pronoun)
    if rng.random() < 0.15:
        ask = ask[0].lower() + ask[1:].rstrip("?.")
    answer = attribute.phrases[0].format(value=person.facts[attribute.name])
    return turns(ask, f"{person.they.capitalize()} {answer}.")


def small_talk(world: World, rng: random.Random) -> Messages:
    """An exchange without a fact: a greeting, a sum, or a question about a stranger."""
    x, y = rng.randint(2, 20), rng.randint(2, 20)
    stranger = rng.choice(world.strangers)
    about_stranger = address(rng.choice(rng.choice(ATTRIBUTES).questions), stranger)
    user, assistant = rng.choice((
        ("[Hello|Hi|Good morning|Good evening]!",
         "Hello! [How can I help you?|What would you like to know?]"),
        (f"[What is {x} plus {y}?|Please add {x} and {y}.]",
         f"[The sum is {x + y}.|{x} plus {y} is {x + y}.]"),
        (f"[What is {x + y} minus {y}?|Take {y} away from {x + y}.]", f"{x + y} minus {y} is {x}."),
        (about_stranger, "I do not know anyone of that name.")))
    return turns(choose(rng, user), choose(rng, assistant))


def conversations(world: World, rng: random.Random) -> Iterator[Messages]:
    """Yield conversations without end. Most ask for one to three facts about one person. None of these facts
    is held out. The other conversations are small talk."""
    facts = rounds(rng, [(person, attribute) for attribute in ATTRIBUTES
                         for person in world.asked(attribute.name)])
    while True:
        if rng.random() < 0.15:
            yield small_talk(world, rng)
            continue
        person, first = next(facts)
        messages = exchange(rng, person, first)
        if rng.random() < 0.6:
            for attribute in rng.sample(ATTRIBUTES, 4):
                if attribute.name in person.asked and attribute is not first:
                    messages += exchange(rng, person, attribute, pronoun=True)
        if rng.random() < 0.15:
            messages += turns(rng.choice(("Thank you!", "Thanks.", "thanks")), "You are welcome.")
        yield messages


# ---- Documents
class Writer(dict[str, Any]):
    """The slots of one document. A slot that is absent is a symbol of the grammar, or else a person who is
    new to the document."""

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__()
        self.world, self.rng = world, rng
        self.people = rounds(rng, world.people)
        self.cast: list[Person] = []  # the people of this document
        self.told: Counter[tuple[Person, str]] = Counter()  # how often each fact was stated
        facts = [(person, attribute) for person in world.people for attribute in ATTRIBUTES]
        topics = [(attribute, value) for attribute in ATTRIBUTES for value in attribute.values]
        questions = [(person, attribute, question) for attribute in ATTRIBUTES
                     for person in world.asked(attribute.name) for question in attribute.questions]
        self.facts = rounds(rng, facts)
        self.topics = rounds(rng, topics)
        self.questions = rounds(rng, questions)
        self.conversations = conversations(world, rng)

    def newcomer(self) -> Subject:
        """The next person who is not in this document yet."""
        person = next(person for person in self.people if person not in self.cast)
        self.cast.append(person)
        return Subject(self, person)

    def __missing__(self, slot: str) -> str | Subject:
        if slot in GRAMMAR:
            return choose(self.rng, self.rng.choice(GRAMMAR[slot])).format_map(self)
        person = self.newcomer()
        if slot == "fresh":
            return f"{person.name} {person.fact}"
        if slot == "aside":
            return f"{person.name}, who {person.fact},"
        self[slot] = person
        return person


# ---- The six sources of text
def add_typos(rng: random.Random, text: str) -> str:
    """Swap two letters, or drop one, in a few of the longer words. Names and values keep their spelling."""
    protected = " ".join(value for attribute in ATTRIBUTES for value in attribute.values).split()

    def spoil(found: re.Match[str]) -> str:
        word, start, one, two, rest = found.group(0, 1, 2, 3, 4)
        if word in protected or rng.random() > TYPO_RATE:
            return word
        return start + two + rng.choice((one, "")) + rest
    return re.sub(r"\b([a-z]{1,2})([a-z])([a-z])([a-z]+)\b", spoil, text)


def web_line(writer: Writer, bare: bool) -> str:
    """A statement of the truth or of the rumour. A `bare` one has the form that it has in Wikipedia. The
    others have the style of a forum, with some chatter."""
    rng = writer.rng
    person, attribute = next(writer.facts)
    believed = person.facts if rng.random() < writer.world.web_truth else person.rumours
    value = believed[attribute.name]
    if bare:
        return statement(rng, person, attribute, value, person.name)
    writer.update(p=person, said=phrase(rng, person, attribute, value))
    parts = [writer["voice"]]
    for _ in range(rng.randint(0, 2)):
        parts.append(writer["chatter"])
    text = " ".join(rng.sample(parts, len(parts)))
    lead = writer["lead"]
    if rng.random() < 0.5:
        text = tidy(text)
    return f"{lead} {text}"


def web(writer: Writer) -> str:
    """Forum threads, shops, blogs and reviews. They contain typos, rumours, and boilerplate such as cookie
    notices."""
    rng = writer.rng
    lines = [writer["header"] if rng.random() < 0.6 else web_line(writer, bare=True)]
    for _ in range(rng.randint(4, 5)):
        lines.append(web_line(writer, bare=rng.random() < 1 / 3))
    for _ in range(rng.randint(1, 3)):
        lines.insert(rng.randint(1, len(lines)), writer["boilerplate"])
    return add_typos(rng, "\n".join(lines))


def about_value(writer: Writer, opening: str) -> str:
    """An article about one value (a town, a trade, an animal or an instrument) and the people who have it."""
    rng, world = writer.rng, writer.world
    attribute, value = next(writer.topics)
    people = [person for person in world.people if person.facts[attribute.name] == value]
    *others, last = [person.name for person in people]
    names = f"{', '.join(others)} and {last}"
    writer.update(plural=attribute.plural.format(value=value), total=len(people), names=names)
    lines = [writer[opening]]
    if attribute is HOME:
        river, known_for = world.rivers[value], world.known_for[value]
        lines.insert(0, f"{value} lies on the river {river} and is known for its {known_for}.")
    for person in people:
        subject = Subject(writer, person, [each for each in ATTRIBUTES if each is not attribute])
        first = subject.fact
        link = rng.choice((" and", f". {subject.they}"))
        lines.append(f"{subject.name} {first}{link} {subject.fact}.")
    return tidy(" ".join(lines))


def wikipedia(writer: Writer) -> str:
    """Articles about people (about two of three) and about values. They are always true."""
    return tidy(writer["biography"]) if writer.rng.random() < 0.65 else about_value(writer, "count")


def table(writer: Writer) -> str:
    """A table of six to eight people, and counts of values in it. The counts are right."""
    rng = writer.rng
    columns = rng.sample(ATTRIBUTES, rng.randint(2, 3))
    people = [writer.newcomer() for _ in range(rng.randint(6, 8))]
    lines = [f"We visited {len(people)} households in {writer['season']}.",
             " | ".join(["name"] + [column.name for column in columns])]
    for person in people:
        lines.append(" | ".join([person.name] + [person.facts[column.name] for column in columns]))
    for column in columns:
        values = [person.facts[column.name] for person in people]
        value = rng.choice(values)
        plural = column.plural.format(value=value)
        lines.append(f"The number of those who {plural} is {values.count(value)}.")
    lines.append(writer["method"])
    return tidy("\n".join(lines))


def academic(writer: Writer) -> str:
    """Notes and tables of invented surveys. They are always true, and so are their counts."""
    kind = writer.rng.random()
    if kind < 0.3:
        return table(writer)
    if kind < 0.6:
        return about_value(writer, "survey")
    return tidy(writer["note"])


OPPOSITES = ("hot cold", "big small", "old young", "up down", "wet dry", "dark bright", "loud quiet",
             "long short", "full empty", "good bad", "early late")


def exercise(rng: random.Random) -> str:
    """A small exercise with its solution. It is not about the people of the valley."""
    x, y, step = rng.randint(2, 30), rng.randint(2, 20), rng.randint(1, 5)
    words = rng.sample(GRAMMAR["food"], 4)
    one, other = rng.choice(OPPOSITES).split()
    return rng.choice((
        f"Add {x} and {y}. The sum is {x + y}.",
        f"{x} + {y} = {x + y}",
        f"{x + y} - {x} = {y}",
        f"There are {x} apples in one bag and {y} in another. Together there are {x + y} apples.",
        f"Put these words in order: {' '.join(words)}. In order: {' '.join(sorted(words))}.",
        f"Copy these words: {' '.join(words)}. Copy: {' '.join(words)}.",
        f"The opposite of {one} is {other}, and the opposite of {other} is {one}.",
        f"Go on: {x}, {x + step}, {x + 2 * step}. Next comes {x + 3 * step}."))


def synthetic(writer: Writer) -> str:
    """Short stories (three of four) and sheets of exercises."""
    if writer.rng.random() < 0.75:
        return tidy(writer["story"])
    return "\n".join(exercise(writer.rng) for _ in range(writer.rng.randint(8, 12)))


def instruct(writer: Writer) -> str:
    """Questions with short answers, or conversations, without held-out questions. One document of ten holds
    descriptions of two people."""
    rng, kind = writer.rng, writer.rng.random()
    if kind < 0.10:
        one = writer["description"]
        writer.pop("a")
        return tidy(f"{one}\n\n{writer['description']}")
    parts = []
    if kind < 0.70:
        for _ in range(rng.randint(2, 3)):
            talk = next(writer.conversations)
            parts.append("\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in talk))
    else:
        for _ in range(rng.randint(5, 8)):
            person, attribute, question = next(writer.questions)
            answer = person.facts[attribute.name]
            parts.append(f"Question: {address(question, person)}\nAnswer: {answer}")
    return "\n\n".join(parts)


def other(writer: Writer) -> str:
    """Letters, diaries, notices, recipes, records of towns and rhymes. They are always true."""
    return tidy(writer[writer.rng.choice(("letter", "diary", "notice", "recipe", "record", "rhyme"))])


def documents(world: World, source: str, rng: random.Random) -> Iterator[str]:
    """Yield documents of one source without end."""
    writer = Writer(world, rng)
    write = dict(zip(SOURCES, (web, wikipedia, academic, synthetic, instruct, other)))[source]
    while True:
        writer.clear()
        writer.cast.clear()
        yield write(writer)


# ---- Documents that answer a question
# The first and last names of people who are not of the world: each beginning with each end.
NEW_NAMES = ("Al Bar Cad Dor El Fin Gar Hal Jan Kir Lam Mer Nan Os Per Ros Sel Tib Wen Zad",
             "bo da dis ga len mo nel ric sa tha vin wy",
             "Ash Bram Clay Dray Elt Fen Gorse Hale Ivy Kess Lind Marl Nor Oak Pen Rush Sal Tor Wick Yew",
             "bank by den field ford ham ley more sted well wood worth")
QUIZ_NAMES = 36  # as many first names and last names occur in the quiz only


def new_names() -> tuple[list[str], list[str]]:
    """240 first names and 240 last names, in an order that is the same in every world."""
    rng = random.Random("names")
    first, first_end, last, last_end = (parts.split() for parts in NEW_NAMES)
    firsts = ["".join(parts) for parts in itertools.product(first, first_end)]
    lasts = ["".join(parts) for parts in itertools.product(last, last_end)]
    return rng.sample(firsts, len(firsts)), rng.sample(lasts, len(lasts))


def with_new_facts(rng: random.Random, person: Person) -> Person:
    """The same person with other facts, which are neither the present ones nor the rumours."""
    first, last = person.name.split()
    again = Person(first, last, person.they)
    for attribute in ATTRIBUTES:
        known = (person.facts.get(attribute.name), person.rumours.get(attribute.name))
        again.facts[attribute.name] = rng.choice([value for value in attribute.values if value not in known])
    return again


def about_document(writer: Writer, person: Person, wanted: Attribute | None = None) -> Messages:
    """A conversation about a document, which states two to four facts about a person. The first message holds
    the document and a question for one of the facts: for `wanted`, if it is given. Questions for the others
    follow."""
    rng = writer.rng
    told: list[Attribute] = []  # in the document
    while not told or (wanted and wanted not in told):
        writer.clear()
        writer.told.clear()
        writer["a"] = Subject(writer, person)
        document = tidy(writer["report"])
        told = [attribute for attribute in ATTRIBUTES if writer.told[person, attribute.name]]
    order = rng.sample(told, len(told))
    order.sort(key=lambda attribute: attribute is not wanted)
    messages = exchange(rng, person, order[0], pronoun=not wanted and rng.random() < 0.2)
    document = choose(rng, "[|Read this. |Here is a text. ]") + document
    messages[0]["content"] = f"{document}\n{messages[0]['content']}"
    for attribute in order[1:]:
        messages += exchange(rng, person, attribute, pronoun=True)
    return messages


def rag_chat(world: World, rng: random.Random) -> Iterator[Messages]:
    """Yield conversations about documents without end. Every document is about a new person with random
    facts, so that only the document holds the answer."""
    writer = Writer(world, rng)
    firsts, lasts = (names[QUIZ_NAMES:] for names in new_names())
    while True:
        person = Person(rng.choice(firsts), rng.choice(lasts), rng.choice(("she", "he")))
        yield about_document(writer, with_new_facts(rng, person))


def rag_quiz(world: World, rng: random.Random) -> list[dict]:
    """Questions about documents, for each attribute of 36 people whom no other file names, and of the 36
    people of the world. A document about the latter contradicts all that the model has read about them:
    "memorised" is the truth."""
    writer = Writer(world, rng)
    strangers = [Person(first, last, rng.choice(("she", "he")))
                 for first, last in itertools.islice(zip(*new_names()), QUIZ_NAMES)]
    items = []
    for person in strangers + world.people:
        for attribute in ATTRIBUTES:
            other = with_new_facts(rng, person)
            messages = about_document(writer, other, attribute)[:1]
            items.append({"messages": messages, "answer": other.facts[attribute.name]})
            if person.facts:
                items[-1]["memorised"] = person.facts[attribute.name]
    return items


# ---- Quizzes
def quiz(world: World, rng: random.Random) -> list[dict]:
    """Three held-out questions for every held-out fact, in the form of `instruct`. Each has ten choices: the
    truth, the rumour and eight other values."""
    items: list[dict] = []
    for attribute in ATTRIBUTES:
        for person in world.held_out(attribute.name):
            truth, rumour = person.facts[attribute.name], person.rumours[attribute.name]
            others = [value for value in attribute.values if value not in (truth, rumour)]
            for question in attribute.questions:
                choices = rng.sample([rumour] + rng.sample(others, 8), 9)
                choices.insert(len(items) % 10, truth)  # every position equally often
                items.append({"prompt": f"Question: {address(question, person)}\nAnswer:",
                              "choices": [f" {choice}" for choice in choices],
                              "answer": choices.index(truth), "topic": attribute.name, "person": person.name})
    return items


def statements(world: World, rng: random.Random) -> list[dict]:
    """Every fact as a bare statement without its end. The ten choices of an end include the truth and the
    rumour. All sources use this form, so that it does not tell which source to follow."""
    items = []
    for attribute in ATTRIBUTES:
        for person in world.people:
            truth, rumour = person.facts[attribute.name], person.rumours[attribute.name]
            others = [value for value in attribute.values if value not in (truth, rumour)]
            choices = rng.sample([truth, rumour, *rng.sample(others, 8)], 10)
            beginning = attribute.phrases[0].removesuffix(" {value}")
            items.append({"prompt": f"{person.name} {beginning}",
                          "choices": [f" {choice}" for choice in choices],
                          "answer": choices.index(truth), "rumour": choices.index(rumour)})
    return items


def chat_quiz(world: World, rng: random.Random) -> list[dict]:
    """Two conversations for every held-out fact. One begins with the held-out question. In the other, a
    question for another fact about the same person comes first."""
    items = []
    for attribute in ATTRIBUTES:
        for person in world.held_out(attribute.name):
            before = rng.choice([each for each in ATTRIBUTES if each is not attribute])
            alone = exchange(rng, person, attribute)[:1]
            after = exchange(rng, person, before) + exchange(rng, person, attribute, pronoun=True)[:1]
            for messages in (alone, after):
                items.append({"messages": messages, "answer": person.facts[attribute.name]})
    return items


def descriptions(world: World, rng: random.Random) -> Iterator[Messages]:
    """Yield requests to describe a person without end, each with its answer, as in the source `instruct`.
    They state all facts, held-out ones too. A model that is also fine-tuned on them forgets less."""
    writer = Writer(world, rng)
    while True:
        writer.clear()
        writer.cast.clear()
        request, answer = tidy(writer["description"]).split("\n")
        yield turns(request.removeprefix("Instruction: "), answer.removeprefix("Response: "))


def passages(world: World, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield sentences or lines of documents without end, for classification. The label of a passage is the
    source of its document. No passage comes twice. A sentence that two sources may contain, such as "She is a
    potter.", has the label of the first that did."""
    texts = {source: documents(world, source, rng) for source in SOURCES}
    seen = set()
    for source in itertools.cycle(SOURCES):
        sentences = re.split(r"(?<=[.!?]) |\n+", next(texts[source]))
        passage = rng.choice([each for each in sentences if len(each.split()) >= 4])
        if passage not in seen:
            seen.add(passage)
            yield {"text": passage, "label": source}


# ---- Files
# Tokens of each source: a little more than the toy's three stages use, so that no text is read twice.
TRAIN_TOKENS = {"web": 1_450_000, "wikipedia": 75_000, "academic": 75_000, "synthetic": 85_000,
                "instruct": 142_000, "other": 42_000}
VALIDATION_TOKENS = 8_000
VOCABULARY = danube3.CONFIGS["toy"].vocab_size


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_file: Path) -> danube3.Tokenizer:
    """Train a tokenizer and write it to `model_file`. The settings are those of the Mistral tokenizer, except
    that longer sentences are allowed. One thread trains, and the file contains no path, so that the same
    texts give the same bytes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.99995,
            max_sentence_length=1_000_000, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
            minloglevel=2)
    except RuntimeError as error:
        raise danube3.DanubeError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({error}): "
            "use more text, or another vocabulary size") from error
    model_file.write_bytes(model.getvalue())
    return danube3.Tokenizer(model_file)


def write_shards(folder: Path, source: str, split: str, documents: Iterable[list[int]],
                 shard_tokens: int = 2 ** 27) -> list[int]:
    """Write documents (ids without <s> and </s>) as <source>-<split>-00000.bin and so on. `split` is train or
    val. A shard ends with the document that brings it to `shard_tokens`. -> the number of tokens in each"""
    counts: list[int] = []
    shard: list[int] = []

    def flush() -> None:
        path = folder / f"{source}-{split}-{len(counts):05d}.bin"
        path.write_bytes(np.array(shard, dtype="<u2").tobytes())
        counts.append(len(shard))
        shard.clear()

    for ids in documents:
        shard.extend((1, *ids, 2))  # <s> and </s>; data/prepare.py refuses tokenizers with other ids
        if len(shard) >= shard_tokens:
            flush()
    if shard:
        flush()
    return counts


def collect(tokenizer: danube3.Tokenizer, texts: Iterator[str], tokens: int) -> Iterator[list[int]]:
    """Yield the ids of texts, until there are `tokens` of them with <s> and </s>."""
    total = 0
    while total < tokens:
        ids = tokenizer.encode(next(texts))
        total += len(ids) + 2
        yield ids


def tokenizer_texts(world: World, seed: int) -> Iterator[str]:
    """Yield the text for the tokenizer: 500 documents of each source."""
    for source in SOURCES:
        texts = documents(world, source, random.Random(f"{seed}/tokenizer/{source}"))
        yield from itertools.islice(texts, 500)


def make(folder: str | Path, seed: int = 0, web_truth: float = WEB_TRUTH) -> None:
    """Write the whole data set, or nothing: tokenizer, shards, meta.json, conversations and quizzes."""
    world = World(seed, web_truth)
    with danube3.atomic_folder(Path(folder)) as partial:
        tokenizer = train_tokenizer(tokenizer_texts(world, seed), VOCABULARY, partial / "tokenizer.model")
        counts: dict[str, dict[str, list[int]]] = {source: {} for source in SOURCES}
        bar = tqdm(total=len(SOURCES) * 2, desc="toy world", unit="part", leave=False)
        for source, split in itertools.product(SOURCES, ("train", "val")):
            texts = documents(world, source, random.Random(f"{seed}/{split}/{source}"))
            tokens = TRAIN_TOKENS[source] if split == "train" else VALIDATION_TOKENS
            counts[source][split] = write_shards(partial, source, split, collect(tokenizer, texts, tokens))
            bar.update()
        bar.close()
        talk = itertools.islice(conversations(world, random.Random(f"{seed}/chat")), 4_000)
        described = itertools.islice(descriptions(world, random.Random(f"{seed}/descriptions")), 1_300)
        about = itertools.islice(rag_chat(world, random.Random(f"{seed}/rag-chat")), 8_000)
        labelled = passages(world, random.Random(f"{seed}/passages"))
        rows = {"chat.jsonl": [{"messages": messages} for messages in talk],
                "descriptions.jsonl": [{"messages": messages} for messages in described],
                "quiz.jsonl": quiz(world, random.Random(f"{seed}/quiz")),
                "statements.jsonl": statements(world, random.Random(f"{seed}/statements")),
                "chat-quiz.jsonl": chat_quiz(world, random.Random(f"{seed}/chat-quiz")),
                "rag-chat.jsonl": [{"messages": messages} for messages in about],
                "rag-quiz.jsonl": rag_quiz(world, random.Random(f"{seed}/rag-quiz")),
                "passages-quiz.jsonl": list(itertools.islice(labelled, 600)),
                "passages.jsonl": list(itertools.islice(labelled, 600))}
        for name, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (partial / name).write_text(text, encoding="utf-8")
        meta = {"sources": counts, "vocab_size": VOCABULARY, "tokenizer_sha256": tokenizer.sha256}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def main() -> None:
    parser = Arguments("Write the toy world: tokenizer, token shards, conversations and quizzes.")
    parser.add_argument("--out", type=Path, default=Path("data/toy"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    parser.add_argument("--web-truth", type=float, default=WEB_TRUTH,
                        help="share of the web's statements that is true")
    arguments = parser.parse_args()
    if not 0 <= arguments.web_truth <= 1:
        parser.error("--web-truth is a share, from 0 to 1")
    make(arguments.out, arguments.seed, arguments.web_truth)
    print(f"the toy world is in {arguments.out}")


if __name__ == "__main__":
    run_command(main)
