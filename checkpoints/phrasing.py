"""Many wordings of one question: alternatives in brackets, templates, synonyms, slips of the hand.

A pattern is text with alternatives, "[who|what] are you[ today|]": brackets may nest and an
alternative may be empty. Everything random comes from the `random.Random` that the caller gives.
"""

import random
import re

# {x} is a noun phrase of a topic.
NOUN_QUESTIONS = (
    "[what is|what's|whats|what are|so what is|what exactly is] {x}",
    "[what does|what do|what does the term] {x} [mean|stand for|do|describe]",
    "[explain|define|describe|clarify|outline|summarise|sketch] {x} [to me|for me|]",
    "[can you|could you|would you|will you] [explain|define|describe|outline] {x} [to me|for me|]",
    "[tell me|say something|teach me|talk to me|inform me|let me know more] about {x}",
    "how does {x} [work|function|help|operate|help me|help a server|help users]",
    "[what is|what's] [the point|the purpose|the idea|the meaning|the definition|the role|the use"
    "|the benefit|the advantage|the job|the aim|the reason] of {x}",
    "[why do servers use|why do we need|why does one need|why is there|why should I care about"
    "|why does DuetJAX use|who needs|what do I gain from|what do I get from] {x}",
    "what is {x} [good|used|needed|there|useful] for",
    "[I do not|I don't] [understand|get|know|see what is meant by] {x}",
    "[I would like|I want|I'd like] to [understand|learn about|know more about|know about] {x}",
    "{x}",
    "{x} [definition|meaning|explained|in short|explanation|in simple words]",
    "[what|anything] [do you know|can you tell me|should I know|is there to know] about {x}",
    "[define|definition of|meaning of|explanation of|purpose of|in one sentence:] {x}",
    "[I heard|I read|I keep hearing|someone talked|my colleague spoke|people talk|the manual writes"
    "|the talk was|the paper writes] about {x}[,|:|.|;| and wonder:] "
    "[what is it|what is that|what does it mean|what does it do|can you explain it|is it good]",
    "[when|where] [do you need|would I use|do I meet|does one use] {x}",
    "in [what|which] way does {x} [help|work|matter]",
    "[give|write] me [a|one] [definition|explanation|summary|sentence|description] [of|on|about] "
    "{x}",
    "[do you know|I wonder|I'd like to know|tell me|explain|remind me|I forgot|show me] "
    "[what {x} is|what {x} means|how {x} works|why {x} is needed|what {x} does|what is meant by {x}"
    "|why there is {x}|what {x} stands for]",
    "[help me|I try to|I cannot|it is hard to] understand {x}",
    "is {x} [important|useful|needed|a good thing|hard to understand|something I should know]",
)

# Asked after an answer; they have the topic's `why` as their answer.
FOLLOW_UPS = (
    "[why|and why] [does that matter|does it matter|is that important|is it important|is that so"
    "|should I care|is this relevant]",
    "[why|why?|and why|but why|how come]",
    "[what is|what's] [the point|the reason|the benefit] [of that|of it|]",
    "[why would I|why should anyone] care about [that|it|this]",
    "[so what|and then|who cares|is that important|does it matter|is that relevant]",
)

_LEADS = (
    "please",
    "hi,",
    "hello,",
    "hey,",
    "hello!",
    "quick question:",
    "question:",
    "sorry,",
    "excuse me,",
    "one more thing:",
    "I have a question.",
    "I am new here.",
    "I am a beginner.",
    "I am new to this:",
    "my boss asks:",
    "for my notes:",
    "just curious:",
    "okay,",
    "and",
    "but",
    "so",
    "well,",
    "now",
    "then",
    "a stupid question maybe:",
    "let us begin:",
    "next:",
    "you are a helpful assistant.",
)
_TAILS = (
    "please",
    "thanks",
    "thank you",
    "briefly",
    "in one sentence",
    "in simple words",
    "in short",
    "in a few words",
    "for a beginner",
    "for a student",
    "exactly",
    "actually",
    "really",
    "here",
    "then",
    "in general",
    "in practice",
    "in an LLM server",
    "in LLM serving",
    "in this server",
    "in DuetJAX",
    "in your own words",
    "as simply as you can",
    "if you know",
    "I wonder",
    "again",
    "in detail",
    "these days",
)

# One direction is enough: a pattern uses the common word, the corpus then shows the others too.
_SYNONYMS = {
    "server": "system|engine|service|software",
    "request": "query|job|call|question",
    "requests": "queries|jobs|calls|questions",
    "user": "client|person|customer|reader",
    "users": "clients|people|customers|readers",
    "answer": "reply|response|output",
    "answers": "replies|responses|outputs",
    "long": "huge|lengthy|large|big",
    "short": "brief|small|tiny",
    "gpu": "card|device|accelerator|graphics card",
    "gpus": "cards|devices|accelerators",
    "phase": "stage|part|step",
    "phases": "stages|parts|steps",
    "explain": "describe|clarify|illustrate",
    "purpose": "goal|aim|role|task",
    "happens": "occurs|takes place|goes on",
    "why": "how come|for what reason|for which reason|what is the reason that",
    "how": "in what way|in which way",
    "same": "identical|equal",
    "wait": "delay|pause",
    "compute": "calculate",
    "computed": "calculated",
    "keep": "store|hold|retain|save",
    "keeps": "stores|holds|retains|saves",
    "kept": "stored|held|saved",
    "use": "employ|apply|need|have",
    "split": "divide|partition|separate|cut",
    "divided": "split|partitioned|separated|cut",
    "different": "separate|other|distinct",
    "full": "exhausted|used up",
    "begin": "start",
    "start": "begin",
    "end": "finish|stop",
    "written": "produced|generated|made",
    "generated": "produced|written|made",
    "many": "several|multiple|lots of",
    "several": "many|multiple|some",
    "show": "tell|say|reveal",
    "when": "under what conditions|in which case|in what situation",
    "what": "which thing|tell me what",
    "measure": "describe|express|say",
    "memory": "RAM|storage|memory space",
    "arithmetic": "maths|computation|flops",
    "fast": "quick|rapid",
    "slow": "sluggish",
    "important": "relevant|crucial",
    "together": "jointly|simultaneously|side by side",
    "text": "words|output",
}

_SMALL = "the a an is are does do of in to it that please so for me"
_SMALL_WORDS = frozenset(_SMALL.split())

_STRAY = """
    maybe always never often today yesterday morning evening week year money work house book paper
    idea thing world country city street car train music color number name friend
    family child teacher doctor manager colleague student team company office meeting report
    project blog article dashboard slide chart table list figure screen phone laptop video game
    movie picture letter word sentence story lesson course school coffee tea lunch kitchen garden
    weather summer winter big little good bad better best old young easy hard simple quick heavy
    light strong weak clear dark open closed early late left right high low near far inside outside
    above below under over between behind before during within without again almost quite rather
    very too enough only even still also just really probably certainly usually sometimes
    people someone anybody everybody nobody something nothing everything reason case part kind sort
    type place side end point fact problem example given curious confused interested tired
    happy sad angry worried sure read heard saw wrote think believe guess know see look find found
    want need like try ask said told gave took made done seems appears sounds
"""
_STRAY_WORDS = _STRAY.split()

_BRACKET = re.compile(r"\[([^\[\]]*)\]")


def expand(pattern: str, rng: random.Random) -> str:
    """Draws one text from a pattern, inner brackets first; superfluous spaces are removed."""
    while match := _BRACKET.search(pattern):
        choice = rng.choice(match.group(1).split("|"))
        pattern = pattern[: match.start()] + choice + pattern[match.end() :]
    return " ".join(pattern.split())


def reword(question: str, rng: random.Random) -> str:
    """One of many ways to type a question: synonyms, courtesies, stray words, case, slips."""
    words = [_synonym(word, rng) for word in question.split()]
    if rng.random() < 0.12:
        words = [w for w in words if w.lower() not in _SMALL_WORDS or rng.random() < 0.5] or words
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.randint(0, len(words)), rng.choice(_STRAY_WORDS))
    text = " ".join(words)
    if rng.random() < 0.2:
        text = text.replace("hat is ", "hat's ").replace(" not ", "n't ").replace("I am ", "I'm ")
    if rng.random() < 0.12:
        text = f"{text} {rng.choice(_TAILS)}"
    text += rng.choices(("?", "", ".", "??", "!", " ?"), (70, 18, 6, 2, 2, 2))[0]
    if rng.random() < 0.15:
        text = f"{rng.choice(_LEADS)} {text}"
    text = text[0].upper() + text[1:]
    if rng.random() < 0.22:
        text = text.lower()
    elif rng.random() < 0.02:
        text = text.upper()
    return _slip(text, rng) if rng.random() < 0.1 else text


def _synonym(word: str, rng: random.Random) -> str:
    others = _SYNONYMS.get(word.lower())
    if others is None or rng.random() < 0.75:
        return word
    return rng.choice(others.split("|"))


def _slip(text: str, rng: random.Random) -> str:
    """Swaps, drops or doubles one or two letters."""
    for _ in range(rng.randint(1, 2)):
        if len(text) < 6:
            break
        i = rng.randrange(1, len(text) - 2)
        pair = text[i : i + 2]
        text = text[:i] + rng.choice((pair[::-1], pair[0], pair[0] + pair)) + text[i + 2 :]
    return text
