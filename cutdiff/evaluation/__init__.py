"""The evaluation of methods: it draws pictures, scores them, and shows the scores.

Read `testbed` first: one model draws the captions of fixed scenes (`cells`), and `score` compares the pictures with
true renders, by what they show, by `metrics` of pictures and by distances between their `features`. `references`
compares pictures of any model with a folder of images instead. `report` makes a table and a contact sheet, `page` the
page that shows all of it in a browser.
"""
