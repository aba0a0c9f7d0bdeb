"""Records for tests, of networks of any size, with names as files of strangers may have them."""

from typing import Any

import numpy as np

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)\' {{ 7 * 7 }} {% raw %}',
    "\x00\x1b[31mred\x1b[0m\r\n\u2028next",
    "right\u202eto\u2066left\u200f",
    "\ud800 alone",
    "]]>--><style>*{display:none}</style>",
    "javascript:alert(1)//" + "very/long/" * 400,
    "אבג/دهد/层/🎛",
)
"""Names of layers."""


def name_of(number: int) -> str:
    """The name of a layer: every third one is hostile."""
    return HOSTILE[number // 3 % len(HOSTILE)] + f" {number}" if number % 3 == 1 else f"backbone.{number}.conv"


def reason(code: str, text: str, **arguments: Any) -> dict[str, Any]:
    return {"code": code, "arguments": arguments, "text": text}


def layer(number: int, rng: np.random.Generator) -> dict[str, Any]:
    if number % 11 == 5:
        why = reason("BIAS_COMPUTED", "its bias is computed at run time")
        numbers = dict.fromkeys(("method", "channels", "shift_before", "shift_after", "sqnr_before", "sqnr_after"))
        return {"name": name_of(number), "operator": "Gemm", **numbers, "reasons": [why], "worst_channels": []}
    shift = float(rng.lognormal(-3, 2))
    before = float(rng.normal(20, 6))
    return {
        "name": name_of(number),
        "operator": "Conv",
        "method": "activation 0.5",
        "channels": 64,
        "shift_before": shift,
        "shift_after": shift / 300,
        "sqnr_before": before,
        "sqnr_after": before + float(rng.normal(5, 2)) if number % 13 else None,
        "reasons": [reason("BIAS_ADDED", "it had no bias; one was added")] if number % 7 == 0 else [],
        "worst_channels": [{"channel": k, "shift": shift * (6 - k) * (-1) ** k} for k in range(5)],
    }


def score(candidate: str, sqnrs: np.ndarray, gain: float | None, is_taken: bool) -> dict[str, Any]:
    gains = {} if gain is None else {"sqnr": {"mean": gain, "error": 0.7}, "divergence": {"mean": 0.01, "error": 0.002}}
    return {
        "candidate": candidate,
        "sqnr": float(sqnrs.mean()),
        "divergence": 0.02,
        "metric": None,
        "sqnr_of_samples": sqnrs.tolist(),
        "gains": gains,
        "is_taken": is_taken,
    }


def equalization(layers: int) -> dict[str, Any]:
    """The record of an equalization whose chains have two layers."""
    rng = np.random.default_rng(1)
    chains = []
    for number in range(0, layers - 1, 2):
        ranges = [
            {
                "layer": name_of(k),
                "channels": 64,
                "before": rng.lognormal(0, 1.5, 64).tolist(),
                "after": rng.lognormal(0, 0.3, 64).tolist(),
            }
            for k in (number, number + 1)
        ]
        ranges[0]["after"][0] = 0.0
        names = [each["layer"] for each in ranges]
        chains.append(
            {"layers": names, "bits": 2.5, "factors": {"min": 0.1, "max": 9.0}, "bounds": 1, "silent": 0, "ranges": ranges}
        )
    return {
        "kind": "equalization",
        "biascorr": "1.2.3",
        "layer_count": layers,
        "folds": [{"batch_norm": name_of(1), "layer": name_of(0)}],
        "replaced": [name_of(4)],
        "chains": chains,
        "high_biases": [{"first": name_of(0), "second": name_of(1), "largest": 1.5}],
        "left": [
            {"name": name_of(k), "reasons": [reason("IS_OUTPUT", "its output is an output of the model")]} for k in range(9)
        ],
        "changes": [
            {"step": "scaling", "absolute": 1e-6, "relative": 1e-7},
            {"step": "high-bias fold", "absolute": None, "relative": None},
        ],
        "data_digest": "0" * 64,
        "seconds": 1.5,
        "versions": {"python": "3.13.0"},
        "files": {"reference": f"/folder/{HOSTILE[0]}/{HOSTILE[1]}.onnx"},
        "command": None,
    }


def correction(layers: int, *, samples: int = 16, **others: Any) -> dict[str, Any]:
    """The record of a correction of so many layers."""
    rng = np.random.default_rng(0)
    before = rng.normal(25, 3, samples)
    gains = {"none": None, "squared": 4.0, "activation 0.5": 5.0, "iterative": -1.0}
    scores = [score(name, before + (gain or 0.0), gain, name == "activation 0.5") for name, gain in gains.items()]
    return {
        "kind": "correction",
        "biascorr": "1.2.3",
        "method": "activation 0.5",
        "samples": 4 * samples,
        "batches": 4 * samples,
        "scored_samples": samples,
        "is_held_out": True,
        "is_simulated": True,
        "is_refitted": True,
        "seconds": 12.7,
        "scores": scores,
        "deployed": [],
        "layers": [layer(number, rng) for number in range(layers)],
        "notes": [f"not all samples were read: {HOSTILE[0]}"],
        "equalization": None,
        "data_digest": "a" * 64,
        "versions": {"python": "3.13.0", "numpy": "2.3.0"},
        "files": {"reference": "net.onnx", "data": HOSTILE[3]},
        "command": f"biascorr correct net.onnx --data '{HOSTILE[2]}' --report out.html",
    } | others
