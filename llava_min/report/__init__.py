"""report.html of an evaluation or of a training run: one file that works offline.

`eval.py` passes its rows and scores to evaluation.py, `train.py` its run folder to run.py. Python
writes the static parts: scores, settings, curves as SVG (curves.py). eval.js draws the examples as
they scroll into view and filters them; run.js shows a curve's value at the pointer. page.py has the
parts that both pages share, thumbnails.py the images.
"""

from llava_min.report.evaluation import rows_to_show, write_eval_report
from llava_min.report.run import write_run_report

__all__ = ["rows_to_show", "write_eval_report", "write_run_report"]
