// Tables whose rows a search field and a choice of kinds narrow down.
for (const input of document.querySelectorAll("[data-filters]")) {
  const id = input.dataset.filters;
  const kinds = document.querySelector(`[data-kinds="${id}"]`);
  const rows = [...document.getElementById(id).querySelectorAll("tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const narrow = () => {
    const wanted = input.value.toLowerCase();
    for (const [row, text] of rows) {
      row.hidden = !text.includes(wanted) || Boolean(kinds && kinds.value && row.dataset.kind !== kinds.value);
    }
  };
  input.addEventListener("input", narrow);
  if (kinds) kinds.addEventListener("change", narrow);
}
