//! Reports a benchmark's results: tables on the terminal, and raw figures as JSON in files.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::samples::Samples;

/// A table of text. The first column is aligned left, and all others are aligned right.
pub(crate) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        let head = columns.iter().map(|&column| column.to_owned()).collect();
        Table {
            title: title.into(),
            rows: vec![head],
        }
    }

    pub(crate) fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        let mut row = vec![name.to_owned()];
        row.extend(cells);
        self.rows.push(row);
    }

    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = format!("\n{}\n", self.title);
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = match column {
                    0 => write!(line, "  {cell:<width$}"),
                    _ => write!(line, "  {cell:>width$}"),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Formats a figure with about three significant digits, or a dash for `None`.
pub(crate) fn figure(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// Formats `value` as a multiple of `base`.
pub(crate) fn ratio(value: Option<f64>, base: Option<f64>) -> String {
    figure(
        value
            .zip(base)
            .filter(|(_, base)| *base > 0.0)
            .map(|(value, base)| value / base),
    )
}

/// The values of several quantities for several servers. The table shows the ratio of each server's
/// value to the first server's value.
pub(crate) struct Comparison {
    title: String,
    names: Vec<String>,
    quantities: Vec<String>,
    values: BTreeMap<(String, String), Vec<f64>>,
}

impl Comparison {
    pub(crate) fn new(title: impl Into<String>, names: &[String], quantities: &[&str]) -> Self {
        let quantities = quantities
            .iter()
            .map(|&quantity| quantity.to_owned())
            .collect();
        Comparison {
            title: title.into(),
            names: names.to_vec(),
            quantities,
            values: BTreeMap::new(),
        }
    }

    /// Adds one value for each quantity. `values` has the same order as the comparison's
    /// quantities.
    pub(crate) fn add(&mut self, name: &str, values: &[f64]) {
        for (quantity, &value) in self.quantities.clone().iter().zip(values) {
            self.add_one(name, quantity, value);
        }
    }

    pub(crate) fn add_one(&mut self, name: &str, quantity: &str, value: f64) {
        self.values
            .entry((name.to_owned(), quantity.to_owned()))
            .or_default()
            .push(value);
    }

    fn samples(&self, name: &str, quantity: &str) -> Samples {
        let values = self.values.get(&(name.to_owned(), quantity.to_owned()));
        Samples::new(values.cloned().unwrap_or_default())
    }

    pub(crate) fn table(&self) -> Table {
        let mut columns = vec![String::new()];
        for (number, name) in self.names.iter().enumerate() {
            columns.push(name.clone());
            columns.push("p90".to_owned());
            if number > 0 {
                columns.push(format!(
                    "× {}",
                    self.names.first().map_or("", String::as_str)
                ));
            }
        }
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let mut table = Table::new(self.title.clone(), &columns);
        for quantity in &self.quantities {
            let mut cells = Vec::new();
            let first = self
                .names
                .first()
                .and_then(|name| self.samples(name, quantity).median());
            for (number, name) in self.names.iter().enumerate() {
                let samples = self.samples(name, quantity);
                cells.push(figure(samples.median()));
                cells.push(figure(samples.quantile(0.9)));
                if number > 0 {
                    cells.push(ratio(samples.median(), first));
                }
            }
            table.row(quantity, cells);
        }
        table
    }

    pub(crate) fn raw(&self) -> Value {
        let mut raw: BTreeMap<&str, BTreeMap<&str, &Vec<f64>>> = BTreeMap::new();
        for ((name, quantity), values) in &self.values {
            raw.entry(name).or_default().insert(quantity, values);
        }
        json!(raw)
    }
}

/// Returns a description of the machine on which the figures were measured.
pub(crate) fn machine() -> Value {
    let first_line = |path: &str, start: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_default();
        line.rsplit(": ")
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    json!({
        "kernel": first_line("/proc/sys/kernel/osrelease", ""),
        "processor": first_line("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "load": first_line("/proc/loadavg", ""),
        "view": std::env::var("RRUN_TEST_VIEW").unwrap_or_default(),
    })
}

/// Prints a table and appends it to `results`/tables.txt.
pub(crate) fn show(results: &Path, table: &Table) -> Result {
    use std::io::Write as _;
    let text = table.text();
    print!("{text}");
    let path = results.join("tables.txt");
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("T", &["", "wall", "ratio"]);
        table.row("crun", ["6.60".to_owned(), ratio(Some(6.6), Some(2.2))]);
        assert_eq!(
            table.text(),
            "\nT\n        wall  ratio\n  crun  6.60   3.00\n"
        );
        assert_eq!(ratio(None, Some(1.0)), "–");
    }
}
