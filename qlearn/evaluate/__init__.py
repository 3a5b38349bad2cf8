"""What quantization cost: the measures of the course, for any causal language model of transformers.

    perplexity                             how well the model foretells a text        perplexity.py
    kl_divergence, flip_rate, same_top_p   how far it is from the unquantized model   divergence.py
    parse_rate                             whether it still writes valid Python       parse.py
    bits_per_weight, model_bytes           what it weighs, everything counted         size.py
    report, table                          all of it in one row, and rows in a table  report.py

The text they are measured on ships with the package (`texts.py`), and how it is cut into windows is a convention
(`windows.py`).
"""

from qlearn.evaluate.completions import complete
from qlearn.evaluate.divergence import Comparison, Reference, compare, flip_rate, kl_divergence, same_top_p
from qlearn.evaluate.parse import function_headers, parse_rate, parses
from qlearn.evaluate.perplexity import perplexity
from qlearn.evaluate.report import Row, Table, report, table
from qlearn.evaluate.size import bits_per_weight, model_bytes, quantized_layers
from qlearn.evaluate.texts import calibration_text, evaluation_text

__all__ = [
    "Comparison",
    "Reference",
    "Row",
    "Table",
    "bits_per_weight",
    "calibration_text",
    "compare",
    "complete",
    "evaluation_text",
    "flip_rate",
    "function_headers",
    "kl_divergence",
    "model_bytes",
    "parse_rate",
    "parses",
    "perplexity",
    "quantized_layers",
    "report",
    "same_top_p",
    "table",
]
