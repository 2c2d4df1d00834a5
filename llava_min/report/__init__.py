"""report.html: what an evaluation or a training run gave, as one file that opens anywhere and asks
no network.

The last station: `eval.py` hands over its rows and scores (evaluation.py), `train.py` its run
folder (run.py). Python writes everything that stands still: scores, settings, curves as SVG
(curves.py); eval.js draws the examples as they are scrolled to and filters them, run.js shows the
values under the pointer. page.py holds what both pages are made of, pictures.py the thumbnails.
"""

from llava_min.report.evaluation import write_eval_report
from llava_min.report.run import write_run_report

__all__ = ["write_eval_report", "write_run_report"]
