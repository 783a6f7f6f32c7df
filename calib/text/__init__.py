"""Text that every installation has: the language reference inside CPython (`pydoc_data.topics`).

About 465 000 characters of technical English with code, under the PSF licence, so a run needs no network and the
package carries no data. Two halves that share no paragraph:

* held out, for verification: topics in alphabetical order, each taken if the held-out text then stays within a fifth of
  the text seen so far. (Every fifth topic would be simpler, but topics differ 200-fold in length: it held out between 2
  and 30 percent.)
* calibration: the other topics, without paragraphs that also stand in a held-out topic (topics quote each other).

A paragraph that occurs twice is kept once. The text differs a little between Python versions; results carry the SHA-256
of the tokens, so that two runs can be told apart.
"""

from __future__ import annotations

from calib.text.builtin import calibration_text, held_out_text
from calib.text.sentences import held_out_sentences

__all__ = ["calibration_text", "held_out_sentences", "held_out_text"]
