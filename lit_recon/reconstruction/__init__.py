"""The method: the walk over the windows, and the fit of each.

driver.py             the walk, one screen
retraining.py         all layers at once, after the walk; fit_state.py: resumed within their fit
fit_settings.py       settings of every window's fit
window_fit.py         fit a window; accept it or keep its pruned weights
window_result.py      what the fit of a window came to
fitted_weights.py     weights that a fit changes: copied, rounded, put back
start.py              least squares as the start of a window's training
rate_search.py        at which learning rates a window is tried
notes.py              the note on a window: what failed, what was kept
tensorboard.py        one log for all windows
trainer_callbacks.py  learning rate, which state is kept
held_out_errors.py    errors on held-out samples, from the Trainer's own validations
"""
