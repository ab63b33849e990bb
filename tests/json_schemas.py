"""Random JSON schemas whose texts are short, and what is valid against them, said anew.

Not with a library, nor as a grammar: each keyword is looked at on its own, and one that is not
known here is a mistake of the test's.
"""

import json
import re

LETTERS = "abcdefgh"
_WORDS = ("red", "green", "blue", "x y", "", "été", 'q"q', "a\\b", "line\nline")
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}
_NOTES = {"$defs", "title"}


def random_schema(dice, depth=2):
    """A schema, drawn from a `random.Random`; nested up to `depth` deep, by reference perhaps."""
    schema = _schema(dice, depth)
    if dice.random() < 0.2:
        return {"$ref": "#/$defs/it", "$defs": {"it": schema}, "title": "by reference"}
    return schema


def is_valid(text, schema):
    """Whether a text is JSON, written once and on one line, and valid against a schema."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except ValueError:
        return False
    return _matches(value, schema, schema)


def _object(pairs):
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError(f"a key comes twice: {pairs}")
    return dict(pairs)


def _no_number(text):
    raise ValueError(f"{text} is no JSON")


def _schema(dice, depth):
    kinds = [_enum, _const, _string, _pattern, _integer, _simple, _kinds]
    if depth:
        kinds += [_any, *(_array, _tuple) * 2, *[_record] * 5]
    return dice.choice(kinds)(dice, depth)


def _enum(dice, _):
    return {"enum": dice.sample([*_WORDS, 0, -7, 12.5, True, None, [1, "a"], {"k": [None]}], 4)}


def _const(dice, _):
    return {"const": dice.choice([*_WORDS, 3, False, None, ["a", {"b": 1}]])}


def _string(dice, _):
    least = dice.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + dice.randint(0, 6)}


def _pattern(dice, _):
    patterns = ("^[a-f]{2,5}$", r"^\d{4}-\d{2}$", "^(ab|cd){1,3}$", "^x?y?z$", "^[A-Z][a-z]{0,4}$")
    return {"type": "string", "pattern": dice.choice(patterns)}


def _integer(dice, _):
    least = dice.randint(-150, 100)
    return {"type": "integer", "minimum": least, "maximum": least + dice.choice((0, 9, 1_000))}


def _simple(dice, _):
    return {"type": dice.choice(("boolean", "null"))}


def _kinds(dice, _):
    return {"type": dice.sample(["boolean", "null", "string"], 2), "maxLength": dice.randint(0, 5)}


def _any(dice, depth):
    return {"anyOf": [_schema(dice, depth - 1) for _ in range(dice.randint(1, 3))]}


def _array(dice, depth):
    least = dice.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + dice.randint(0, 2)}
    return {"type": "array", "items": _schema(dice, depth - 1), **bounds}


def _tuple(dice, depth):
    items = [_schema(dice, depth - 1) for _ in range(dice.randint(1, 3))]
    exactly = {"minItems": len(items), "items": False}
    return {"type": "array", "prefixItems": items, **exactly}


def _record(dice, depth):
    names = dice.sample([*LETTERS, "two words", "ü"], dice.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _schema(dice, depth - 1) for name in names},
        "required": [name for name in names if dice.random() < 0.6],
        "additionalProperties": False,
    }


def _matches(value, schema, root):
    if isinstance(schema, bool):
        return schema
    return all(
        _holds(keyword, wanted, value, schema, root)
        for keyword, wanted in schema.items()
        if keyword not in _NOTES
    )


def _holds(keyword, wanted, value, schema, root):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match keyword:
        case "$ref":
            place = root
            for name in wanted.removeprefix("#/").split("/"):
                place = place[name]
            return _matches(value, place, root)
        case "type":
            names = [wanted] if isinstance(wanted, str) else wanted
            return any(_is_a(value, name) for name in names)
        case "enum":
            return any(_is_same(value, each) for each in wanted)
        case "const":
            return _is_same(value, wanted)
        case "anyOf":
            return any(_matches(value, each, root) for each in wanted)
        case "minLength":
            return not isinstance(value, str) or len(value) >= wanted
        case "maxLength":
            return not isinstance(value, str) or len(value) <= wanted
        case "pattern":
            return not isinstance(value, str) or re.search(wanted, value, re.ASCII) is not None
        case "minimum":
            return not is_number or value >= wanted
        case "maximum":
            return not is_number or value <= wanted
        case "minItems":
            return not isinstance(value, list) or len(value) >= wanted
        case "maxItems":
            return not isinstance(value, list) or len(value) <= wanted
        case "prefixItems":
            items = value if isinstance(value, list) else []
            return all(_matches(v, s, root) for v, s in zip(items, wanted, strict=False))
        case "items":
            items = value if isinstance(value, list) else []
            rest = items[len(schema.get("prefixItems", ())) :]
            return all(_matches(each, wanted, root) for each in rest)
        case "properties":
            found = value if isinstance(value, dict) else {}
            return all(
                _matches(found[name], wanted[name], root) for name in wanted if name in found
            )
        case "required":
            return not isinstance(value, dict) or all(name in value for name in wanted)
        case "additionalProperties":
            assert wanted is False, f"additionalProperties {wanted} is not known here"
            return not isinstance(value, dict) or value.keys() <= schema["properties"].keys()
    raise AssertionError(f"the keyword {keyword} is not known here")


def _is_a(value, name):
    if name in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (name == "number" or float(value).is_integer())
    return isinstance(value, _TYPES[name])


def _is_same(value, wanted):
    """Equal as JSON: 1 is 1.0 and not true."""
    return json.dumps(value, sort_keys=True) == json.dumps(wanted, sort_keys=True)
