// Served by `report --serve`, the page is loaded again when the run has written more.
async function watchRun() {
  const stamp = async () => (await fetch("stamp", { cache: "no-store" })).text();
  const first = await stamp();
  setInterval(async () => {
    try {
      if ((await stamp()) !== first && !document.hidden) location.reload();
    } catch {
      // The server has ended: the page stays as it is.
    }
  }, 5000);
}

if (location.protocol === "http:") watchRun();
