# SPDX-License-Identifier: Apache-2.0
"""Responses that verifiers must live through, each with what it is."""


def hostile(path: str) -> dict[str, str]:
    """Texts by name. path: a file that comes to be where one of them is evaluated."""
    touch = f"__import__('os').system('touch {path}')"
    letters = "+".join(f"chr({ord(letter)})" for letter in f"open({path!r},'w')")
    return {
        "empty": "",
        "space": " \n\t\r\x0b\x0c\u2003",
        "nines": "9" * 10**6,
        "some nines": "9" * 5000,
        "exponent": "1e999999999",
        "minus exponent": "-1e-999999999",
        "power": "10**10**10",
        "caret power": "10^10^10",
        "factorial": "(10^6)!",
        "binomial": r"\binom{10^9}{10^8}",
        "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n!}",
        "brackets": "(" * 100_000,
        "matched brackets": "(" * 400 + "1" + ")" * 400,
        "lists": "[" * 100_000,
        "some lists": "[" * 90 + "]" * 90,
        "braces": "\\boxed{" * 10_000,
        "minuses": "-" * 10_000 + "1",
        "call": touch,
        "call in a list": f"[{touch}]",
        "call in a formula": f"x + {touch}",
        "call by letters": f"eval({letters})",
        "call by a class": f"().__class__.__base__.__subclasses__()[0]({touch})",
        "call by a lambda": f"(lambda: {touch})()",
        "member": "x.func.__globals__",
        "input": "input()",
        "exit": "exit()",
        "long": "1+" * 2_500_000,
        "long words": "The answer is 5. " * 300_000,
        "Arabic digits": "٣٤",
        "wide digits": "１２",
        "raised digits": "5²",
        "a fraction's letter": "½",
        "nul": "5\0",
        "surrogate": "\ud8005\udfff",
        "infinity": "inf",
        "not a number": "nan",
        "json": '{"a": [1, NaN, Infinity, {"b": null}]}',
        "a boolean": "True",
        "zero": "1/0",
        "signs": "--5",
        "tags": "<answer>" * 1000,
        "many lines": "\n" * 10**6,
    }
